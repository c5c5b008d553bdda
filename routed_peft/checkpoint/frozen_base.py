"""The place of a frozen base: the checkpoint that holds it exactly as it is in memory, if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from routed_peft.checkpoint.tensors import inner_model, plain_state_dict
from routed_peft.regions.fingerprint import configuration, fingerprint

logger = logging.get_logger(__name__)

_FOUND: dict[tuple[Any, ...], str | None] = {}
"""Results of comparisons, since every checkpoint of a run asks again."""


def warn_if_changed(model: nn.Module) -> None:
    """Warn where the base of ``model`` is no longer what its checkpoint holds, so that each save of a run will hold it too."""
    inner = inner_model(model)
    if not inner.name_or_path:
        return
    content = fingerprint(model)["content"]
    base, differences = find_base(inner, plain_state_dict(model), revision=None, content=content)
    if base["id"] is None:
        reason = differences[0] if differences else "it is not in the local cache"
        logger.warning(
            f"the base in memory is not that of {inner.name_or_path!r}, of which the run would otherwise be an addition: "
            f"{reason}. It is saved with the run, and with every checkpoint"
        )


def find_base(
    inner: PreTrainedModel, weights: Mapping[str, Tensor], *, revision: str | None, content: str | None
) -> tuple[dict[str, str | None], list[str]]:
    """Return the id and revision of the checkpoint that holds a frozen base, id None if none does; and how others differ.

    transformers does not record the commit of a model, so all commits in the local cache are compared, that of the main
    branch first. A base that was changed in memory is in no checkpoint: a resized vocabulary, a merged LoRA, an edited weight
    or configuration. ``weights`` are those of the model ``inner`` by name, ``content`` is their hash
    (`routed_peft.regions.fingerprint`), and ``revision`` the commit of a base on the Hub, if it is known.
    """
    name, differences = inner.name_or_path or "", list[str]()
    local = Path(name).expanduser()
    for folder in () if not name else [local] if local.is_dir() else _cached(name, revision):
        difference = _difference(folder, inner=inner, weights=weights, content=content)
        if difference is None:
            here = {"id": str(local.resolve()), "revision": None}
            return here if folder is local else {"id": name, "revision": folder.name}, differences
        differences.append(difference)
    return {"id": None, "revision": None}, differences


def _cached(repo: str, revision: str | None) -> Iterator[Path]:
    """Yield the snapshots of a repository in the local cache: that of ``revision`` alone, or all, main branch first."""
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    refs = [root / "refs" / name for name in (revision, "main") if name]
    first = [ref.read_text().strip() for ref in refs if ref.is_file()]
    folders = {path.name: path for path in (root / "snapshots").glob("*")}
    wanted = [revision, *first[:1]] if revision else [*first, *sorted(folders)]
    yield from (folders[name] for name in dict.fromkeys(wanted) if name in folders)


def _difference(
    folder: Path, *, inner: PreTrainedModel, weights: Mapping[str, Tensor], content: str | None
) -> str | None:
    """Return in what a checkpoint differs from ``inner``, or None."""
    files = sorted(folder.glob("*.safetensors"))
    stamp = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in [*files, *folder.glob("config.json")])
    key = (str(folder.resolve()), stamp, content, str(inner.dtype), str(configuration(inner)))
    if key not in _FOUND or content is None:
        _FOUND[key] = _compare(folder, files, inner=inner, weights=weights)
    return _FOUND[key]


def _compare(folder: Path, files: list[Path], *, inner: PreTrainedModel, weights: Mapping[str, Tensor]) -> str | None:
    """Compare configuration and weights of a checkpoint with those of ``inner``; quantized weights are not read."""
    try:
        saved = type(inner.config).from_pretrained(folder)
    except (OSError, ValueError):  # no checkpoint, such as that of a sub-folder
        return f"{folder} holds no checkpoint of this kind of model"
    mine, theirs = configuration(inner), configuration(saved)
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key]:
            return f"`{key}` is {theirs[key]!r} there and {mine[key]!r} in memory"
    if getattr(inner, "is_quantized", False):
        return None
    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    seen = {tensor.data_ptr() for name, tensor in weights.items() if name in where}
    if files and all(name in where or tensor.data_ptr() in seen for name, tensor in weights.items()):
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in weights and not _equal(file.get_tensor(name), weights[name]):
                        return f"`{name}` has other values or another shape there"
        return None
    return _compare_loaded(folder, inner, weights)


def _compare_loaded(folder: Path, inner: PreTrainedModel, weights: Mapping[str, Tensor]) -> str | None:
    """Compare with the checkpoint as transformers loads it, for names that it maps and files of other formats."""
    try:
        read: Any = type(inner).from_pretrained
        loaded = read(folder, dtype=inner.dtype, local_files_only=True).state_dict()
    except Exception as error:  # whatever it is, this checkpoint cannot be loaded in place of the base
        logger.warning(f"{folder} cannot be compared with the base in memory ({error})")
        return f"{folder} cannot be loaded in its place"
    odd = [name for name, tensor in weights.items() if name not in loaded or not _equal(loaded[name], tensor)]
    return f"`{odd[0]}` has other values or another shape there" if odd else None


def _equal(saved: Tensor, tensor: Tensor) -> bool:
    return saved.shape == tensor.shape and torch.equal(saved.to(tensor.dtype), tensor.detach().cpu())
