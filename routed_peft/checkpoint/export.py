"""Plain checkpoints of a run: without its regions (`ablate`), or with some of them merged (`export`)."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
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
from routed_peft.adapters import find_outlets
from routed_peft.checkpoint.fetch import HUB_ARGUMENTS, fetch, hub_arguments
from routed_peft.checkpoint.layout import REGION, ROUTING
from routed_peft.checkpoint.load import load_run
from routed_peft.checkpoint.open_run import OpenRun
from routed_peft.checkpoint.staging import COMPANIONS, atomic_directory, check_free, copy_matching, files_in, sha256
from routed_peft.deprecation import formerly_positional
from routed_peft.files import write_json
from routed_peft.regions.fingerprint import fingerprint
from routed_peft.runs.provenance import versions
from routed_peft.runs.records import ABLATION

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # relative to the largest logit: merging rounds once more
_FLOAT32_TOLERANCE = 1e-5
_ALLOWED = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py")


def ablate(src: str | Path, out: str | Path, *, revision: str | None = None, **from_pretrained_kwargs: Any) -> Path:
    """Write a plain checkpoint of a run without any region. Base adapters are merged.

    The new checkpoint is loaded again before it appears at ``out``, and its logits are compared with those of the run
    with its regions off. They must be equal, or equal up to rounding if base adapters were merged.
    ``out/ablation.json`` records the comparison, fingerprints and the SHA-256 of every file. Tokenizer, generation
    config and license files are copied.

    Args:
        src: directory or Hub id of a run that `save_routed` wrote.
        out: directory that does not exist or is empty.
        revision: branch, tag or commit of a Hub id.
        **from_pretrained_kwargs: for `AutoModelForCausalLM.from_pretrained` and the Hub. The dtype stays as saved.

    Returns:
        The resolved ``out``.

    Raises:
        ValueError: ``out`` is not free or lies in ``src``, or `load_routed` refuses ``src``.
        RuntimeError: the check failed; nothing is left at ``out``.
        OSError: writing failed; nothing is left at ``out``.

    >>> ablate("run", "run")
    Traceback (most recent call last):
    ...
    ValueError: `out` ... is the source itself: ...
    """
    return export(src, out, revision=revision, **from_pretrained_kwargs)


@formerly_positional("keep")
def export(
    src: str | Path,
    out: str | Path,
    *,
    keep: Iterable[str] = (),
    scale: float | Mapping[str, float] = 1.0,
    revision: str | None = None,
    regions_repo: str | Path | None = None,
    **from_pretrained_kwargs: Any,
) -> Path:
    """Write a plain checkpoint of a run with only the regions ``keep`` merged; otherwise as `ablate`.

    Args:
        src: as for `ablate`, like the other arguments that are not named here.
        keep: names of regions to merge; ValueError for one that is not a region of the run.
        scale: factor on their contribution, or one by region (1 where left out); see `routed_peft.evaluation.choose_scale`.
        regions_repo: directory or Hub id of regions that are not stored with the run; by default the one that it names.

    >>> export("run", "run/plain", keep=["bio"])
    Traceback (most recent call last):
    ...
    ValueError: `out` ... lies inside the source ...: ...
    """
    target = _checked_target(src, out)
    run = OpenRun.from_source(src, revision, regions_repo=regions_repo, **hub_arguments(from_pretrained_kwargs))
    layout = run.layout
    kept = layout.check_regions(keep, "keep")
    scales = _scales(scale, kept)
    removed = [name for name in layout.regions if name not in kept]
    present = [name for name in removed if run.commit is None and (layout.root / name).is_dir()]
    model = load_run(run, [name for name in layout.regions if name in (*kept, *present)], **from_pretrained_kwargs)
    assert isinstance(model, PreTrainedModel | PeftModel)
    batch = _batch(model)
    expected = _expected_logits(model, batch, removed=present, scales=scales)
    record: dict[str, Any] = {
        "source": str(src) if run.commit else str(layout.root),
        "revision": run.commit,
        "regions_removed": removed,
        "regions_kept": kept,
        "scale": scale,
        "base_adapters_merged": layout.base_adapters,
        "source_base_fingerprint": fingerprint(model),
        "source_manifests": source_manifests(run, kept),
    }
    merged, adapter_attributes = [*layout.base_adapters, *kept], _adapter_attributes(model)
    plain = _merge(model, merged, scales=scales)
    with atomic_directory(target, fresh=True) as aside:
        plain.save_pretrained(aside)
        del model, plain
        _copy_companions(run, aside, from_pretrained_kwargs.get("base"))
        _check_content(aside, adapter_attributes)
        record |= _verified(aside, batch, expected=expected, exact=not merged, kwargs=from_pretrained_kwargs)
        record["sha256"] = {name: sha256(aside / name) for name in files_in(aside)}
        record |= {"versions": versions(), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        write_json(aside / ABLATION, record)
    return target


def source_manifests(run: OpenRun, keep: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the manifests of a run and of the adapters that its export with ``keep`` holds."""
    adapters = {name: sha256(run.adapter_folder(name) / REGION) for name in (*run.layout.base_adapters, *keep)}
    return {ROUTING: sha256(run.layout.root / ROUTING), **adapters}


def _checked_target(src: str | Path, out: str | Path) -> Path:
    src, out = Path(src).expanduser().resolve(), Path(out).expanduser().resolve()
    if out == src:
        raise ValueError(f"`out` {out} is the source itself: name another directory")
    if src in out.parents:
        raise ValueError(f"`out` {out} lies inside the source {src}: name a directory outside it")
    check_free(out)
    return out


def _scales(scale: float | Mapping[str, float], kept: list[str]) -> dict[str, float]:
    """Return the factor of every region ``kept``."""
    unknown = [name for name in scale if name not in kept] if isinstance(scale, Mapping) else [scale] * (not kept)
    if unknown and scale != 1.0:
        raise ValueError(f"`scale` is {scale}, but no region is kept that it could scale: name some in `keep`")
    return {name: scale.get(name, 1.0) if isinstance(scale, Mapping) else scale for name in kept}


def _merge(model: PreTrainedModel | PeftModel, merged: list[str], *, scales: Mapping[str, float]) -> Any:
    """Return the model without adapters: those ``merged`` are part of its weights, regions times their scale."""
    for name, factor in scales.items():
        shared = dict.fromkeys(
            p for outlet in find_outlets(model, [name]) for p in outlet.parameters()
        )  # tied rows once
        for p in shared if factor != 1.0 else ():
            p.data *= factor
    if not isinstance(model, PeftModel):
        return model
    return model.merge_and_unload(safe_merge=True, adapter_names=merged) if merged else model.unload()


def _batch(model: PreTrainedModel | PeftModel) -> Tensor:
    config = model.config.get_text_config()
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, batch: Tensor) -> Tensor:
    batch = batch.to(model.device)
    return model.eval()(input_ids=batch, attention_mask=torch.ones_like(batch)).logits.cpu()


def _expected_logits(
    model: PreTrainedModel | PeftModel, batch: Tensor, *, removed: list[str], scales: Mapping[str, float]
) -> Tensor:
    with ExitStack() as stack:
        for name, factor in {**dict.fromkeys(removed, 0.0), **scales}.items():
            stack.enter_context(ablated(model, name, scale=factor) if factor != 1.0 else nullcontext())
        return _logits(model, batch)


def _adapter_attributes(model: nn.Module) -> set[str]:
    """Return the names of the attributes that hold adapters' tensors in ``model``."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {"base_layer"}.union(*(set(layer.adapter_layer_names) | set(layer.other_param_names) for layer in layers))


def _copy_companions(run: OpenRun, folder: Path, base: Any) -> None:
    """Copy the tokenizer and license files of the run, and from the base those that the run lacks."""
    layout = run.layout
    copy_matching(layout.root, folder, COMPANIONS)
    if not layout.saved_base and not isinstance(base, nn.Module):
        place, revision = (layout.data["base"]["id"], layout.data["base"]["revision"]) if base is None else (base, None)
        copy_matching(fetch(place, revision, COMPANIONS, **run.hub)[0], folder, COMPANIONS)


def _check_content(folder: Path, adapter_attributes: set[str]) -> None:
    """Raise RuntimeError if ``folder`` holds an unexpected file, or a tensor that an adapter could own."""
    allowed = (*_ALLOWED, *COMPANIONS)
    strangers = [name for name in files_in(folder) if not any(fnmatch(name, pattern) for pattern in allowed)]
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            strangers += [name for name in file.keys() if adapter_attributes & set(name.split("."))]
    if strangers:
        what = f"the export holds {strangers[:5]}, which may belong to a region"
        raise RuntimeError(f"{what}: nothing was written; report this")


def _verified(folder: Path, batch: Tensor, *, expected: Tensor, exact: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Load ``folder`` with plain transformers and compare its logits; RuntimeError if they differ by more than rounding."""
    skip = {*HUB_ARGUMENTS, "base", "dtype", "torch_dtype", "use_safetensors"}
    arguments = {name: value for name, value in kwargs.items() if name not in skip}
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **arguments)
    difference = (_logits(model, batch).double() - expected.double()).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    tolerance = 0.0 if exact else scale * _TOLERANCE.get(expected.dtype, _FLOAT32_TOLERANCE)
    if not difference <= tolerance:
        raise RuntimeError(f"the export's logits differ by {difference:.3g} from those of the source with its regions "
                           f"off, allowed is {tolerance:.3g}: nothing was written. Are all weights finite? Is the base "
                           "the one that was trained on?")  # fmt: skip
    return {
        "max_logit_difference": difference,
        "allowed_logit_difference": tolerance,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
    }
