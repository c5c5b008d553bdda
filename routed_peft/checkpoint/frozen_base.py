"""The place of a frozen base: the checkpoint that holds it exactly as it is in memory, if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from routed_peft.regions.fingerprint import configuration

logger = logging.get_logger(__name__)

_FOUND: dict[tuple[Any, ...], bool] = {}
"""Results of comparisons, since every checkpoint of a run asks again."""


def find_base(
    inner: PreTrainedModel, weights: Mapping[str, Tensor], *, revision: str | None, content: str | None
) -> dict[str, str | None]:
    """Return the id and the revision of the checkpoint that holds a frozen base; id None if no checkpoint does.

    transformers does not record the commit of a model, so all commits in the local cache are compared, that of the main
    branch first. A base that was changed in memory is in no checkpoint: a resized vocabulary, a merged LoRA, an edited weight
    or configuration.

    ``weights`` are those of the model ``inner`` by name, and ``content`` is their hash (`routed_peft.regions.fingerprint`).
    ``revision`` is the commit of a base on the Hub, if it is known.
    """
    name = inner.name_or_path
    nowhere: dict[str, str | None] = {"id": None, "revision": None}
    if not name:
        return nowhere
    local, same = Path(name).expanduser(), partial(_same, inner=inner, weights=weights, content=content)
    if local.is_dir():
        return {"id": str(local.resolve()), "revision": None} if same(local) else nowhere
    for folder in _cached(name, revision):
        if same(folder):
            return {"id": name, "revision": folder.name}
    return nowhere


def _cached(repo: str, revision: str | None) -> Iterator[Path]:
    """Yield the snapshots of a repository in the local cache: that of ``revision`` alone, or all, main branch first."""
    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    refs = [root / "refs" / name for name in (revision, "main") if name]
    first = [ref.read_text().strip() for ref in refs if ref.is_file()]
    folders = {path.name: path for path in (root / "snapshots").glob("*")}
    wanted = [revision, *first[:1]] if revision else [*first, *sorted(folders)]
    yield from (folders[name] for name in dict.fromkeys(wanted) if name in folders)


def _same(folder: Path, *, inner: PreTrainedModel, weights: Mapping[str, Tensor], content: str | None) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    stamp = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in [*files, *folder.glob("config.json")])
    key = (str(folder.resolve()), stamp, content, str(inner.dtype), str(configuration(inner)))
    if key not in _FOUND or content is None:
        _FOUND[key] = _compare(folder, files, inner=inner, weights=weights)
    return _FOUND[key]


def _compare(folder: Path, files: list[Path], *, inner: PreTrainedModel, weights: Mapping[str, Tensor]) -> bool:
    """Return whether configuration and weights of a checkpoint are those of ``inner``; quantized weights are not read."""
    try:
        saved = type(inner.config).from_pretrained(folder)
    except (OSError, ValueError):  # no checkpoint, such as that of a sub-folder
        return False
    mine, theirs = configuration(inner), configuration(saved)
    if any(mine[key] != theirs[key] for key in mine.keys() & theirs.keys()):
        return False
    if getattr(inner, "is_quantized", False):
        return True
    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    seen = {tensor.data_ptr() for name, tensor in weights.items() if name in where}
    if files and all(name in where or tensor.data_ptr() in seen for name, tensor in weights.items()):
        for path in files:
            with safe_open(path, framework="pt") as file:
                if not all(_equal(file.get_tensor(name), weights[name]) for name in file.keys() if name in weights):
                    return False
        return True
    return _compare_loaded(folder, inner, weights)


def _compare_loaded(folder: Path, inner: PreTrainedModel, weights: Mapping[str, Tensor]) -> bool:
    """Compare with the checkpoint as transformers loads it, for names that it maps and files of other formats."""
    try:
        read: Any = type(inner).from_pretrained
        loaded = read(folder, dtype=inner.dtype, local_files_only=True).state_dict()
    except Exception as error:  # whatever it is, this checkpoint cannot be loaded in place of the base
        logger.warning(f"{folder} cannot be compared with the base in memory ({error})")
        return False
    return all(name in loaded and _equal(loaded[name], tensor) for name, tensor in weights.items())


def _equal(saved: Tensor, tensor: Tensor) -> bool:
    return saved.shape == tensor.shape and torch.equal(saved.to(tensor.dtype), tensor.detach().cpu())
