"""Plain checkpoints of a run: without its regions (`ablate`), or with some of them merged (`export`)."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from routed_peft.ablation import ablated
from routed_peft.adapters import _outlets
from routed_peft.checkpoint.fetch import HUB_ARGUMENTS, fetch, hub_arguments
from routed_peft.checkpoint.layout import Layout
from routed_peft.checkpoint.load import load_routed
from routed_peft.checkpoint.staging import (
    NOTICE_FILES,
    TOKENIZER_FILES,
    atomic_directory,
    copy_matching,
    files_in,
    sha256,
)
from routed_peft.files import in_use, write_json
from routed_peft.regions.fingerprint import fingerprint
from routed_peft.runs.provenance import versions
from routed_peft.runs.records import RECORD

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit; merging rounds each weight once more
_FLOAT32_TOLERANCE = 1e-5
_ALLOWED = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py")


def ablate(src: str | Path, out: str | Path, *, revision: str | None = None, **from_pretrained_kwargs: Any) -> Path:
    """Write a plain checkpoint of a run, without any region. Base adapters are merged.

    The new checkpoint is loaded again before it appears at ``out``, and its logits are compared with those of the run
    with its regions off: they must be equal, or, where base adapters were merged, equal up to rounding.
    ``out/ablation.json`` says so, with fingerprints and the SHA-256 of every file. Tokenizer, generation config and
    licence files come along.

    Args:
        src: directory or Hub id of a run that `save_routed` wrote.
        out: directory that does not exist or is empty.
        revision: branch, tag or commit of a Hub id.
        **from_pretrained_kwargs: for `AutoModelForCausalLM.from_pretrained` and the Hub. The dtype is kept as saved.

    Returns:
        The resolved ``out``.

    Raises:
        ValueError: where ``out`` is not free, or lies in ``src``; whatever `load_routed` finds wrong with ``src``.
        RuntimeError: where the check fails; nothing is then left at ``out``.
        OSError: when writing fails; likewise.

    Example:
        >>> ablate("run", "run")
        Traceback (most recent call last):
        ...
        ValueError: `out` ... is the source itself: ...
    """
    return export(src, out, revision=revision, **from_pretrained_kwargs)


def export(
    src: str | Path,
    out: str | Path,
    keep: Iterable[str] = (),
    *,
    scale: float = 1.0,
    revision: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Path:
    """Write a plain checkpoint of a run with the regions ``keep`` merged and no other; all else as in `ablate`.

    Args:
        src: directory or Hub id of a run that `save_routed` wrote.
        out: directory that does not exist or is empty.
        keep: names of regions to merge.
        scale: what their contribution is multiplied by; see `routed_peft.evaluation.choose_scale`.
        revision: branch, tag or commit of a Hub id.
        **from_pretrained_kwargs: for `AutoModelForCausalLM.from_pretrained` and the Hub.

    Raises:
        ValueError: as `ablate`, and for a name in ``keep`` that is no region of the run.

    Example:
        >>> export("run", "run/plain", keep=["bio"])
        Traceback (most recent call last):
        ...
        ValueError: `out` ... lies inside the source ...: ...
    """
    target = _free(Path(src).expanduser().resolve(), Path(out).expanduser().resolve())
    hub = hub_arguments(from_pretrained_kwargs)
    root, commit = fetch(src, revision, **hub)
    layout = Layout.read(root, str(src))
    kept = layout.check_regions(keep, "keep")
    if scale != 1.0 and not kept:
        raise ValueError(f"`scale` is {scale}, but no region is kept that it could scale: name some in `keep`")
    merged = [*layout.base_adapters, *kept]
    present = [name for name in layout.regions if name in kept or commit is None and (root / name).is_dir()]
    model = load_routed(src, present, revision=commit, **from_pretrained_kwargs)
    assert isinstance(model, PreTrainedModel | PeftModel)
    removed = [name for name in present if name not in kept]
    batch = _batch(model)
    with ExitStack() as stack:
        for names, part in ((removed, 0.0), (kept, scale)):
            if names:
                stack.enter_context(ablated(model, *names, scale=part))
        expected = _logits(model, batch)
    for outlet in _outlets(model, kept) if scale != 1.0 and kept else ():
        for p in outlet.parameters():
            p.data *= scale
    record: dict[str, Any] = {
        "source": str(src) if commit else str(root),
        "revision": commit,
        "regions_removed": [name for name in layout.regions if name not in kept],
        "regions_kept": kept,
        "scale": scale,
        "base_adapters_merged": layout.base_adapters,
        "source_base_fingerprint": fingerprint(model),
    }
    marks = _marks(model)
    plain = _plain(model, merged)
    with atomic_directory(target) as aside:
        plain.save_pretrained(aside)
        del model, plain
        _copy_companions(layout, aside, from_pretrained_kwargs.get("base"), hub)
        _check_content(aside, marks)
        record |= _verified(aside, batch, expected, exact=not merged, kwargs=from_pretrained_kwargs)
        record["sha256"] = {name: sha256(aside / name) for name in files_in(aside)}
        record["versions"] = versions()
        record["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(aside / RECORD, record)
    return target


def _free(src: Path, out: Path) -> Path:
    if out == src:
        raise ValueError(f"`out` {out} is the source itself: name another directory")
    if src in out.parents:
        raise ValueError(f"`out` {out} lies inside the source {src}: name a directory outside it")
    if in_use(out):
        raise ValueError(f"`out` {out} exists and is not an empty directory: name another, or empty it yourself")
    return out


def _batch(model: PreTrainedModel | PeftModel) -> Tensor:
    config = model.config.get_text_config()
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, batch: Tensor) -> Tensor:
    batch = batch.to(model.device)
    return model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits.cpu()


def _marks(model: nn.Module) -> set[str]:
    """Return the attributes under which adapters keep their tensors in ``model``."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {"base_layer"}.union(*(set(layer.adapter_layer_names) | set(layer.other_param_names) for layer in layers))


def _plain(model: PreTrainedModel | PeftModel, merged: list[str]) -> PreTrainedModel:
    if not isinstance(model, PeftModel):
        return model
    return model.merge_and_unload(safe_merge=True, adapter_names=merged) if merged else model.unload()


def _copy_companions(layout: Layout, folder: Path, base: Any, hub: dict[str, Any]) -> None:
    """Copy tokenizer and licence from the run, and what is not there from the base."""
    patterns = (*TOKENIZER_FILES, *NOTICE_FILES)
    copy_matching(layout.root, folder, patterns)
    if not layout.saved_base and not isinstance(base, nn.Module):
        place, revision = (layout.data["base"]["id"], layout.data["base"]["revision"]) if base is None else (base, None)
        copy_matching(fetch(place, revision, patterns, **hub)[0], folder, patterns)


def _check_content(folder: Path, marks: set[str]) -> None:
    """Raise RuntimeError where ``folder`` holds an unexpected file, or a tensor that an adapter could own."""
    allowed = (*_ALLOWED, *TOKENIZER_FILES, *NOTICE_FILES)
    strangers = [name for name in files_in(folder) if not any(fnmatch(name, pattern) for pattern in allowed)]
    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    strangers += [name for name in names if marks & set(name.split("."))]
    if strangers:
        raise RuntimeError(
            f"the export holds {strangers[:5]}, which may belong to a region: nothing was written; report this"
        )


def _verified(folder: Path, batch: Tensor, expected: Tensor, exact: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Load ``folder`` as anyone would and compare its logits with ``expected``; RuntimeError where they differ."""
    skip = {*HUB_ARGUMENTS, "base", "dtype", "torch_dtype", "use_safetensors"}
    arguments = {name: value for name, value in kwargs.items() if name not in skip}
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **arguments)
    difference = (_logits(model, batch).cpu().double() - expected.cpu().double()).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    tolerance = 0.0 if exact else scale * _TOLERANCE.get(expected.dtype, _FLOAT32_TOLERANCE)
    if not difference <= tolerance:
        raise RuntimeError(
            f"the export's logits differ by {difference:.3g} from those of the source with its regions off, allowed is "
            f"{tolerance:.3g}: nothing was written. Are all weights finite? Is the base the one that was trained on?"
        )
    return {
        "max_logit_difference": difference,
        "allowed_logit_difference": tolerance,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
    }
