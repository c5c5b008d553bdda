"""Separate a wrapped model's own weights from those of its adapters; read and write both strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

_PREFIX = "base_model.model."


def inner_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel`, or the model itself; TypeError for anything else."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"expected a PeftModel or a transformers model, got {type(model).__name__}: unwrap it first, "
                        "for example with `accelerator.unwrap_model(model)`")  # fmt: skip
    return inner


def adapter_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Return the adapters of a `PeftModel`, or of a transformers model with `add_adapter`, by name."""
    return dict(getattr(model, "peft_config", None) or {})


def plain_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the model's own weights under their names without adapters; from ``state_dict`` if it was gathered (FSDP).

    ValueError if an adapter is merged or replaces whole modules, or ``state_dict`` lacks weights.
    """
    inner = inner_model(model)
    tuners = check_own_weights(inner)
    own = inner.state_dict()
    given = own if state_dict is None else {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
    plain = {short: tensor for name, tensor in given.items() if (short := _plain_name(name, tuners)) is not None}
    shared = {own[name].data_ptr() for name in own if name in given}
    missing = [name for name in own if name not in given and _plain_name(name, tuners)]
    if lost := [name for name in missing if own[name].data_ptr() not in shared]:
        raise ValueError(f"`state_dict` lacks {len(lost)} weights of the base, such as {lost[0]!r}: give the full one")
    return plain


def check_own_weights(inner: PreTrainedModel) -> set[str]:
    """Return the names of the layers with adapters; ValueError where an adapter is merged or replaces a whole module."""
    tuners = set()
    for name, module in inner.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name!r} has a trained copy of itself (`modules_to_save` or `trainable_token_indices`), "
                             "which is neither base nor region: leave it out of the adapter's config and train the "
                             "base instead")  # fmt: skip
        if isinstance(module, BaseTunerLayer):
            tuners.add(name)
            if module.merged_adapters:
                raise ValueError(f"the adapters {module.merged_adapters} are merged into {name!r}: call "
                                 "`unmerge_adapter()` first")  # fmt: skip
    return tuners


def _plain_name(name: str, tuners: set[str]) -> str | None:
    """Return ``name`` without the ``base_layer`` of tuner layers; None for a tensor of an adapter."""
    parts, kept = name.split("."), []
    for i, part in enumerate(parts):
        if ".".join(parts[:i]) not in tuners:
            kept.append(part)
        elif part != "base_layer":
            return None
    return ".".join(kept)


def adapter_state_dict(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return copies of the tensors of the adapter ``name``, under the keys of PEFT's adapter files."""
    given, prefix = dict(state_dict) if state_dict else None, "" if isinstance(model, PeftModel) else _PREFIX
    tensors = get_peft_model_state_dict(model, given, name, save_embedding_layers=False)
    copy = partial(torch.clone, memory_format=torch.contiguous_format)
    return {prefix + key: copy(tensor.detach().cpu()) for key, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; ValueError with its name if it is truncated or has another format."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): download or save it again") from error


def check_keys(what: str, got: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ValueError unless two sets of tensor names are equal; ``what`` is the subject of the message."""
    got, expected = set(got), set(expected)
    for problem, names in (("lacks", expected - got), ("has in addition", got - expected)):
        if names:
            raise ValueError(f"{what} {problem} {len(names)} tensors, such as {min(names)!r}: it was saved from "
                             "another model, or with another adapter config")  # fmt: skip


def check_tensors(what: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names and shapes of tensors are as expected; ``what`` is the subject of the message."""
    check_keys(what, got, expected)
    for name, tensor in got.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{what}: {name!r} has the shape {tuple(tensor.shape)}, the model's is "
                             f"{tuple(expected[name].shape)}: load it with the config that it was saved with")  # fmt: skip


def load_adapter_tensors(model: nn.Module, name: str, *, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy ``tensors`` into the adapter ``name`` of ``model``, strictly; ``what`` names them in an error."""
    check_tensors(what, tensors, adapter_state_dict(model, name))
    prefix = "" if isinstance(model, PeftModel) else _PREFIX
    set_peft_model_state_dict(model, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}, name)
