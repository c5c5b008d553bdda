"""Describe a directory or repository of the Hub, without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError

from routed_peft.checkpoint.fetch import ROOT_FILES, fetch
from routed_peft.checkpoint.layout import (
    CONFIG,
    REGION,
    ROUTING,
    WEIGHTS,
    Layout,
    describe_leftovers,
    foreign_weights,
    verify_adapter,
    verify_files,
    verify_weights,
)
from routed_peft.checkpoint.open_run import OpenRun
from routed_peft.files import read_json

_ABLATION = {"source?": str, "regions_removed?": [str], "sha256?": {str: str}}
_SHOWN = ("kind", "size", "heads", "init", "r", "lora_alpha", "embeddings", "norms", "target_modules")


def inspect_checkpoint(src: str | Path, *, revision: str | None = None, **hub: Any) -> dict[str, Any]:
    """Describe a run, a region's folder or a plain checkpoint, as plain data.

    Args:
        src: directory or Hub id. For adapters on the Hub, only configurations are downloaded.
        revision: branch, tag or commit of a Hub id.
        **hub: ``token``, ``cache_dir`` … for the download.

    Returns:
        ``kind`` ("trained base", "frozen base", "region" or "plain checkpoint"), ``source``, ``revision``, and for a
        run ``base``, ``routes``, ``tokens_per_route``, ``versions``, ``kept_regions`` (names of regions that belong to
        the model), ``regions`` and ``base_adapters`` (each a list with name, type, size, parameters, labels, and whether
        its files and fingerprint are those of this run), and ``problems``, a list of sentences about missing, altered or
        foreign files.

    Raises:
        ValueError: ``src`` is none of these.

    >>> inspect_checkpoint("./no-such-run")
    Traceback (most recent call last):
    ...
    ValueError: './no-such-run' is no directory: give the directory of a run, or a Hub id
    """
    root, commit = fetch(src, revision, (*ROOT_FILES, "*.py"), **hub)
    left = describe_leftovers(root)
    about: dict[str, Any] = {"source": str(src), "revision": commit}
    if (root / ROUTING).is_file():
        about |= _describe_run(OpenRun(Layout.read(root, str(src)), commit, hub))
    elif (root / CONFIG).is_file():
        problems = _problems(lambda: verify_adapter(root, str(src)))
        about |= _describe_adapter(root) | {"kind": "region", "problems": problems}
    elif (root / "config.json").is_file():
        about |= _describe_plain(root, str(src))
    else:
        what = f"{str(src)!r} holds none of {ROUTING}, {CONFIG} and config.json: it is no run, region or checkpoint"
        raise ValueError(". ".join([what, *left]))
    about["problems"] += left
    return about


def _describe_plain(root: Path, source: str) -> dict[str, Any]:
    record = root / "ablation.json"
    ablation = read_json(record, _ABLATION) if record.is_file() else None
    expected = (ablation or {}).get("sha256") or {}
    problems = _problems(lambda: verify_files(root, expected, source))
    problems += _problems(lambda: verify_weights(root, expected or foreign_weights(root), source))
    return {"kind": "plain checkpoint", "ablation": ablation, "problems": problems}


def _describe_run(run: OpenRun) -> dict[str, Any]:
    layout = run.layout
    problems = _problems(layout.verify_base)

    def describe(name: str) -> dict[str, Any]:
        folder = run.configuration_folder(name)
        entry: dict[str, Any] = {"name": name, "present": folder.is_dir(), "labels": layout.labels(name)}
        if not folder.is_dir() and (run.commit or layout.data.get("regions_repo")):
            return entry  # regions of a pushed run are stored elsewhere
        listed = partial(layout.verify_listed, name, folder, only=".json")
        problems.extend(_problems(listed if run.commit else partial(layout.adapter_folder, name)))
        entry |= _describe_adapter(folder) if folder.is_dir() else {}
        if (folder / REGION).is_file():
            trained_on = read_json(folder / REGION).get("base_fingerprint")
            entry["fingerprint_ok"] = trained_on == layout.data["base"]["fingerprint"]
            if not entry["fingerprint_ok"]:
                problems.append(f"{name!r} was trained on another base than the one here")
        return entry

    return {
        "kind": "trained base" if layout.data["train_base"] else "frozen base",
        **{key: layout.data.get(key) for key in ("base", "routes", "tokens_per_route", "versions", "regions_repo")},
        "kept_regions": layout.kept_regions,
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
    try:
        count = parse_local_safetensors_file_metadata(weights).parameter_count
    except (SafetensorsParsingError, OSError):  # `problems` names the file
        return about
    return about | {"parameters": sum(count.values()), "dtypes": sorted(count), "bytes": weights.stat().st_size}


def _problems(check: Callable[[], Any]) -> list[str]:
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []
