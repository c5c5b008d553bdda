"""Load a run: the ablated model by default, regions on request, every file verified."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from routed_peft.adapters import guard_saving, routing_record, set_routing_record
from routed_peft.checkpoint.fetch import fetch, hub_arguments
from routed_peft.checkpoint.layout import REGION, WEIGHTS, Layout
from routed_peft.checkpoint.open_run import OpenRun, find_region
from routed_peft.checkpoint.tensors import (
    adapter_configs,
    adapter_state_dict,
    check_tensors,
    inner_model,
    load_adapter_tensors,
    plain_state_dict,
    read_tensors,
)
from routed_peft.files import read_json
from routed_peft.mistakes import reading
from routed_peft.regions.fingerprint import any_values, check_fingerprint, fingerprint
from routed_peft.routes import routes_from_dict


def load_routed(
    src: str | Path,
    regions: Iterable[str] | Mapping[str, str | Path] | None = None,
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    base: str | Path | PreTrainedModel | None = None,
    regions_repo: str | Path | None = None,
    allow_changed_base: bool = False,
    **from_pretrained_kwargs: Any,
) -> nn.Module:
    """Load a run that `save_routed` wrote.

    Args:
        src: directory or Hub id.
        regions: None for the ablated model; a list of names for these regions of the run; ``{name: path or Hub id}``
            for regions stored elsewhere.
        revision: branch, tag or commit of a Hub id.
        is_trainable: whether the adapters are loaded for training.
        base: a loaded model, path or id to use instead of the base that the run names.
        regions_repo: directory or Hub id of regions that are not stored with the run; by default the one that it names.
        allow_changed_base: whether ``base`` may have other values than the base that the regions were trained on, such as
            after fine-tuning without them. Nobody has measured what they do there: this warns. Names, shapes and
            configuration must agree still. A later `save_routed` saves the regions as those of the base in memory, and
            keeps no record that it was changed.
        **from_pretrained_kwargs: for `AutoModelForCausalLM.from_pretrained` and the Hub (``dtype``, ``token``, …).

    Returns:
        A plain transformers model if no adapter is loaded, otherwise a `PeftModel` with all loaded adapters active.

    Raises:
        ValueError: for an unknown region, a missing file, a file that is truncated or was tampered with, or a base
            other than the one the adapters were trained on; for ``allow_changed_base`` without ``base``.
        huggingface_hub.errors.HfHubHTTPError: the repository is missing or gated, or there is no network.

    >>> load_routed("./no-such-run")
    Traceback (most recent call last):
    ...
    ValueError: './no-such-run' is no directory: give the directory of a run, or a Hub id
    """
    run = OpenRun.from_source(src, revision, regions_repo=regions_repo, **hub_arguments(from_pretrained_kwargs))
    return load_run(
        run,
        regions,
        is_trainable=is_trainable,
        base=base,
        allow_changed_base=allow_changed_base,
        **from_pretrained_kwargs,
    )


def load_run(
    run: OpenRun,
    regions: Iterable[str] | Mapping[str, str | Path] | None = None,
    *,
    is_trainable: bool = False,
    base: str | Path | PreTrainedModel | None = None,
    allow_changed_base: bool = False,
    **from_pretrained_kwargs: Any,
) -> nn.Module:
    """Load a run that is open already; arguments and errors as in `load_routed`."""
    if allow_changed_base and base is None:
        raise ValueError("`allow_changed_base=True` needs the changed base: give it as `base=`, or leave both out")
    layout = run.layout
    elsewhere = dict(regions) if isinstance(regions, Mapping) else {}
    names = [] if elsewhere or regions is None else layout.check_regions(regions)
    folders = {name: run.adapter_folder(name) for name in (*layout.base_adapters, *names)}
    folders |= {name: find_region(name, place, **run.hub) for name, place in elsewhere.items()}
    if base is None and run.commit is not None and any(name.endswith(".py") for name in layout.data["files"]):
        _fetch_code(run, from_pretrained_kwargs)
    with reading(layout.source):
        model: nn.Module = base if isinstance(base, nn.Module) else _load_base(layout, base, from_pretrained_kwargs)
    prints = {name: read_json(folder / REGION)["base_fingerprint"] for name, folder in folders.items()}
    given = fingerprint(model) if allow_changed_base else None
    with any_values() if allow_changed_base else nullcontext():
        for print_ in prints.values():
            check_fingerprint(model, print_)
        for name, folder in folders.items():
            with reading(folder):
                model = _add_adapter(model, name, folder=folder, is_trainable=is_trainable)
        if folders or base is not None or not layout.saved_base:  # a saved one is verified; an adapter can change it
            check_fingerprint(model, layout.data["base"]["fingerprint"])
    if given is not None:
        check_fingerprint(model, given)
        _warn_if_changed(given, {"the run": layout.data["base"]["fingerprint"], **prints})
    if folders:
        assert isinstance(model, PeftModel) and isinstance(model.base_model, BaseTuner)
        model.base_model.set_adapter(list(folders), inference_mode=not is_trainable)
        record = replace(  # defaults of a later `save_routed`
            routing_record(model),
            routes=None if layout.data["routes"] is None else routes_from_dict(layout.data["routes"]),
            base_adapters=tuple(layout.base_adapters),
            kept_regions=tuple(layout.kept_regions),
            continues_base=is_trainable and bool(layout.data["train_base"]),
        )
        set_routing_record(model, record)
        guard_saving(model)
    return model


def _warn_if_changed(given: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn where the values of a base are not known to be those that the run and its regions ``expected``."""
    got = given["content"]
    others = {name: p["content"] for name, p in expected.items() if got is None or p["content"] != got}
    if not others:
        return
    hashes = ", ".join(f"{str(content)[:12]} for {name}" for name, content in others.items())
    warnings.warn(
        f"the base given as `base=` is not the one that {list(others)} were trained on, as far as the values of its weights "
        f"tell: their content is {str(got)[:12]}, expected {hashes} (None where values cannot be compared). Nobody has "
        "measured what the regions do on this base: measure it before you rely on them",
        stacklevel=4,
    )


def _fetch_code(run: OpenRun, kwargs: Mapping[str, Any]) -> None:
    """Download the code that a run on the Hub brings along, which nothing else needs, if it may be run."""
    if not kwargs.get("trust_remote_code"):
        raise ValueError(f"{run.layout.source!r} brings code of its own, which runs only with `trust_remote_code` "
                         "(`--trust-remote-code`): read it, and add that if you trust it")  # fmt: skip
    fetch(run.layout.source, run.commit, ["*.py"], **run.hub)


def _load_base(layout: Layout, base: str | Path | None, kwargs: dict[str, Any]) -> PreTrainedModel:
    kwargs = {"use_safetensors": True, **kwargs}
    if base is not None:
        return AutoModelForCausalLM.from_pretrained(base, **kwargs)
    layout.verify_base()
    if layout.saved_base:
        return AutoModelForCausalLM.from_pretrained(layout.root, **kwargs)
    name, revision = layout.data["base"]["id"], layout.data["base"]["revision"]
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"{layout.source!r} was trained on the base {name}, which is no longer there: give its new "
                         "place as `base=`")  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(name, revision=revision, **kwargs)


def _add_adapter(model: nn.Module, name: str, *, folder: Path, is_trainable: bool) -> PeftModel:
    tensors = read_tensors(folder / WEIGHTS)
    # PEFT casts low-precision adapters to float32 when told to; those saved in low precision stay as they are, unless trained
    to_float32 = is_trainable or any(tensor.dtype == torch.float32 for tensor in tensors.values())
    arguments: dict[str, Any] = {"is_trainable": is_trainable, "autocast_adapter_dtype": to_float32}
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), name, **arguments)
    else:
        model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, **arguments)
    check_tensors(f"{folder / WEIGHTS}", tensors, adapter_state_dict(model, name))
    return model


def load_weights(model: nn.Module, path: str | Path, train_base: bool | None = None) -> None:
    """Copy a saved run's weights into ``model``, strictly: the base (if trained) and every adapter.

    Args:
        model: a live model with the same adapters as the run, routed or not.
        path: directory that `save_routed` wrote.
        train_base: whether the model's own weights are loaded; by default, whether the run trained them.

    Raises:
        ValueError: adapters, tensor names or shapes differ, files are damaged, or a frozen base is another one.
            Files and adapters are checked before the first weight is changed.
    """
    root, _ = fetch(path)
    layout = Layout.read(root, str(path))
    train_base = layout.data["train_base"] if train_base is None else train_base
    saved, have = {*layout.regions, *layout.base_adapters}, set(adapter_configs(model))
    if saved != have:
        raise ValueError(f"{str(path)!r} holds the adapters {sorted(saved)}, the model has {sorted(have)}: make them "
                         "the same")  # fmt: skip
    if train_base and not layout.saved_base:
        raise ValueError(f"{str(path)!r} holds no base weights, so `train_base` must be False; its base was frozen")
    layout.verify_base()
    adapters = {name: read_tensors(layout.adapter_folder(name) / WEIGHTS) for name in sorted(saved)}
    for name, tensors in adapters.items():
        check_tensors(f"the adapter {name!r} in {str(path)!r}", tensors, adapter_state_dict(model, name))
    if train_base:
        _load_own(model, layout)
    else:
        check_fingerprint(model, layout.data["base"]["fingerprint"])
    for name, tensors in adapters.items():
        load_adapter_tensors(model, name, tensors=tensors, what=f"the adapter {name!r} in {str(path)!r}")


def _load_own(model: nn.Module, layout: Layout) -> None:
    inner = inner_model(model)
    read: Any = type(inner).from_pretrained
    loaded, report = read(layout.root, dtype=inner.dtype, use_safetensors=True, output_loading_info=True)
    wrong = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(f"the base in {layout.source!r} does not fit {type(inner).__name__}: {wrong}")
    target, source = plain_state_dict(model), loaded.state_dict()
    check_tensors(f"the base in {layout.source!r}", source, target)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
