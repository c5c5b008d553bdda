"""Fingerprints of base weights, so that a region is attached only to the base that it was trained on."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from routed_peft.architectures import is_plain, width

_SAMPLES = 65536
_INCIDENTAL = re.compile(
    r"^_|name_or_path|transformers_version|dtype|architectures|attn_implementation|experts_implementation|quantization_config"
    r"|use_cache|dropout|pdrop|_token_id|^output_|return_dict|label|problem_type|gradient_checkpointing|aux_loss"
    r"|initializer|auto_map|chunk_size|pretraining_tp|task_specific"
)
_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16)
_ANY_VALUES: ContextVar[bool] = ContextVar("any_values", default=False)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return a fingerprint of the base weights of ``model``, independent of its adapters.

    It is the same for a plain model, that model wrapped by PEFT, and that model saved and loaded again. Values are read as
    bfloat16, so a float32 checkpoint loaded in bfloat16 agrees, too. At most 65536 values of each tensor are read, at a
    fixed stride. Tied weights count once, buffers not at all.

    Returns:
        ``{"parameters": number of tensors, "structure": hash of names and shapes, "content": hash of values, "config":
        the `configuration`}``, with content None where values cannot be compared: quantized, float16 or meta weights.

    Raises:
        ValueError: while adapters are merged into the base weights.

    Example:
        >>> fingerprint(nn.Linear(2, 2)) == fingerprint(nn.Linear(2, 2))
        False
    """
    tensors = sorted(_base_parameters(model), key=lambda item: item[0])
    structure, content = hashlib.sha256(), hashlib.sha256()
    comparable = True
    for name, tensor, shape in tensors:
        structure.update(f"{name}:{list(shape)};".encode())
        comparable = comparable and is_plain(tensor) and tensor.dtype in _COMPARABLE and not tensor.is_meta
        if comparable:
            content.update(f"{name};".encode() + _sample(tensor))
    return {
        "parameters": len(tensors),
        "structure": structure.hexdigest(),
        "content": content.hexdigest() if comparable else None,
        "config": configuration(model),
    }


def configuration(model: Any) -> dict[str, Any]:
    """Return the settings that decide the function of a model, or of a transformers configuration; empty without one.

    Left out are settings of loading and training: dtype, attention kernel, dropout, special tokens, outputs.

    >>> configuration(nn.Linear(1, 1))
    {}
    """
    config = getattr(model, "config", model)
    data = config.to_dict() if hasattr(config, "to_dict") else {}
    plain: dict[str, Any] = json.loads(json.dumps(_deciding(data), default=str, sort_keys=True))
    return plain


def _deciding(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    return {str(key): _deciding(value) for key, value in data.items() if not _INCIDENTAL.search(str(key))}


@contextmanager
def any_values() -> Iterator[None]:
    """Let `check_fingerprint` compare structure and configuration alone in this block, also where PEFT leads to it.

    >>> expected = {**fingerprint(nn.Linear(2, 2)), "content": "other"}
    >>> with any_values():
    ...     check_fingerprint(nn.Linear(2, 2), expected)
    """
    token = _ANY_VALUES.set(True)
    try:
        yield
    finally:
        _ANY_VALUES.reset(token)


def check_fingerprint(model: nn.Module, expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless the base weights of ``model`` have the `fingerprint` ``expected``.

    Where the content of either is None, the structure alone is compared, with a warning. Of the configurations, the settings
    that both have are compared, since versions of transformers add some. Within `any_values`, values are not compared.

    Example:
        >>> check_fingerprint(nn.Linear(2, 2), fingerprint(nn.Linear(2, 3)))
        Traceback (most recent call last):
        ...
        ValueError: this region belongs to another base model: the structure differs ...
    """
    missing = {"parameters", "structure", "content"} - set(expected)
    if missing:
        raise ValueError(f"`base_fingerprint` lacks {sorted(missing)}, got {dict(expected)}: save the region again")
    got = fingerprint(model)
    mine, theirs = got["config"], expected.get("config") or {}  # a run of an earlier version has none
    odd = [key for key in sorted(mine.keys() & theirs.keys()) if mine[key] != theirs[key]]
    if got["structure"] != expected["structure"]:
        differs, what = "structure", "the names or shapes of its weights"
    elif odd:
        differs, what = "configuration", f"`{odd[0]}` is {mine[odd[0]]!r}, expected {theirs[odd[0]]!r}"
    elif _ANY_VALUES.get():
        return
    elif None in (got["content"], expected["content"]):
        warnings.warn(
            "the base is quantized, in float16 or not loaded, so only the names and shapes of its weights were "
            "compared with those of the base of this region. Load it in float32 or bfloat16 to "
            "compare values.",
            stacklevel=2,
        )
        return
    elif got["content"] != expected["content"]:
        differs, what = "content", "the values of its weights"
    else:
        return
    raise ValueError(f"this region belongs to another base model: the {differs} differs ({what}). Got a base with "
                     f"{_short(got)}, expected {_short(expected)}. Load the base that was saved with the region "
                     "(`base_model_name_or_path` in its adapter_config.json), at the same revision.")  # fmt: skip


def _short(print_: Mapping[str, Any]) -> str:
    hashes = ", ".join(f"{key} {str(print_[key])[:12]}" for key in ("structure", "content"))
    return f"{print_['parameters']} tensors, {hashes}"


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    stride = -(-flat.numel() // _SAMPLES) or 1
    return flat[::stride].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Yield name, tensor and unpacked shape of each base parameter once, under the name it has in the plain model."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    elif isinstance(model, BaseTuner):
        model = model.model
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                raise ValueError(f"the adapters {module.merged_adapters} are merged into the base weights, which "
                                 "cannot be compared with the saved ones: call `unmerge_adapter()` first")  # fmt: skip
            pending.append((name, module.get_submodule("base_layer")))
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            pending.append((name, module.original_module))
            continue
        prefix = f"{name}." if name else ""
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix + key, parameter, _unpacked_shape(module, key, parameter)
        children = [(prefix + key, child) for key, child in module.named_children()]
        pending.extend(reversed(children))  # depth first and in order, so that tied weights keep their first name


def _unpacked_shape(module: nn.Module, key: str, parameter: Tensor) -> tuple[int, ...]:
    if key == "weight" and not is_plain(parameter) and hasattr(module, "in_features"):
        return (width(module, "out"), width(module, "in"))
    return tuple(parameter.shape)
