"""What a directory or repository holds, without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from routed_peft.checkpoint.fetch import fetch, fetch_folder
from routed_peft.checkpoint.layout import CONFIG, REGION, ROUTING, Layout, verify_adapter, verify_files
from routed_peft.checkpoint.tensors import WEIGHTS
from routed_peft.files import read_json

_SHOWN = ("kind", "size", "init", "r", "lora_alpha", "target_modules")


def inspect_checkpoint(src: str | Path, *, revision: str | None = None, **hub: Any) -> dict[str, Any]:
    """Describe a run, a region's folder or a plain checkpoint, as plain data.

    Args:
        src: directory or Hub id. Of a repository's adapters only the configurations are downloaded.
        revision: branch, tag or commit of a Hub id.
        **hub: ``token``, ``cache_dir`` … for the download.

    Returns:
        ``kind`` ("trained base", "frozen base", "region" or "plain checkpoint"), ``source``, ``revision``, and for a
        run ``base``, ``routes``, ``tokens_per_route``, ``versions``, ``regions`` and ``base_adapters`` (each a list
        with name, type, size, parameters, labels, and whether its files and fingerprint are those of this run), and
        ``problems``: what is wrong, in words.

    Raises:
        ValueError: where ``src`` is nothing of the kind.

    Example:
        >>> inspect_checkpoint("./no-such-run")
        Traceback (most recent call last):
        ...
        ValueError: './no-such-run' is no directory: give the directory of a run, or a Hub id
    """
    root, commit = fetch(src, revision, **hub)
    about: dict[str, Any] = {"source": str(src), "revision": commit}
    if (root / ROUTING).is_file():
        return about | _describe_run(Layout.read(root, str(src)), commit, hub)
    if (root / CONFIG).is_file():
        problems = _problems(lambda: verify_adapter(root, str(src)))
        return about | _describe_adapter(root) | {"kind": "region", "problems": problems}
    if (root / "config.json").is_file():
        record = root / "ablation.json"
        ablation = read_json(record) if record.is_file() else None
        problems = _problems(lambda: verify_files(root, (ablation or {}).get("sha256", {}), str(src)))
        return about | {"kind": "plain checkpoint", "ablation": ablation, "problems": problems}
    raise ValueError(
        f"{str(src)!r} holds none of {ROUTING}, {CONFIG} and config.json: it is no run, region or checkpoint"
    )


def _describe_run(layout: Layout, commit: str | None, hub: dict[str, Any]) -> dict[str, Any]:
    problems = _problems(layout.verify_base)

    def describe(name: str) -> dict[str, Any]:
        folder = fetch_folder(layout.source if commit else layout.root, name, commit, ["*.json"], **hub)
        entry: dict[str, Any] = {"name": name, "present": folder.is_dir(), "labels": layout.labels(name)}
        if not folder.is_dir() and (commit or layout.data.get("regions_repo")):
            return entry  # regions of a pushed run live elsewhere
        if commit is None:
            problems.extend(_problems(lambda: layout.adapter_folder(name)))
        entry |= _describe_adapter(folder) if folder.is_dir() else {}
        if (folder / REGION).is_file():
            entry["fingerprint_ok"] = (
                read_json(folder / REGION).get("base_fingerprint") == layout.data["base"]["fingerprint"]
            )
            if not entry["fingerprint_ok"]:
                problems.append(f"{name!r} was trained on another base than the one here")
        return entry

    return {
        "kind": "trained base" if layout.data["train_base"] else "frozen base",
        **{key: layout.data.get(key) for key in ("base", "routes", "tokens_per_route", "versions", "regions_repo")},
        "regions": [describe(name) for name in layout.regions],
        "base_adapters": [describe(name) for name in layout.base_adapters],
        "problems": problems,
    }


def _describe_adapter(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        return {}
    config = read_json(folder / CONFIG)
    about = {"type": config.get("peft_type"), **{key: config[key] for key in _SHOWN if config.get(key) is not None}}
    weights = folder / WEIGHTS
    if not weights.is_file():
        return about
    try:
        with safe_open(weights, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - no mapping
            parameters = sum(prod(part.get_shape()) for part in slices)
            dtypes = sorted({part.get_dtype() for part in slices})
    except SafetensorError:  # `problems` names the file
        return about
    return about | {"parameters": parameters, "dtypes": dtypes, "bytes": weights.stat().st_size}


def _problems(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []
