"""Hidden units as tensors: appended to an MLP, and removed again exactly, in every supported layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from routed_peft.architectures import MLPLayout, find_mlps, is_plain, mlp_layout, width

_WIDTH_FIELDS = ("ffn_hidden_size", "n_inner", "intermediate_size")  # Falcon; GPT-2; all others


@dataclass(frozen=True, slots=True)
class HiddenUnits:
    """Weights of ``n`` hidden units: ``up`` and ``gate`` ``(n, H)``, ``down`` ``(H, n)``, biases ``(n,)``; absent: None."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    @classmethod
    def zeros(cls, n: int, hidden: int) -> HiddenUnits:
        """Return units whose contribution is exactly zero under any activation."""
        up, bias = torch.zeros(n, hidden), torch.zeros(n)
        return cls(up, torch.zeros(hidden, n), up, bias, bias)


def count_hidden_units(mlp: nn.Module, layout: MLPLayout) -> int:
    """Return the number of hidden units of ``mlp``."""
    return width(getattr(mlp, layout.down), "in")


def check_widenable(mlp: nn.Module, layout: MLPLayout) -> None:
    """Raise ValueError where the weights of ``mlp`` are quantized, or for another reason not plain matrices."""
    for name in filter(None, (layout.gate, layout.up, layout.down)):
        projection = getattr(mlp, name)
        if isinstance(projection, BaseTunerLayer):  # a region inside the MLP, gone by the time of a merge
            projection = projection.get_base_layer()
        if not isinstance(projection, nn.Linear | Conv1D) or not is_plain(projection.weight):
            raise ValueError(
                f"hidden units cannot be merged into `{name}` of {type(mlp).__name__}: it is a "
                f"{type(projection).__name__} with quantized or wrapped weights. Load the base unquantized (float32 or "
                "bfloat16), or keep the region as an adapter."
            )


def widen(mlp: nn.Module, layout: MLPLayout, units: HiddenUnits) -> None:
    """Append ``units`` after the hidden units of ``mlp``, in place."""
    for projection, parts in _in_projections(mlp, layout):
        axis = _hidden_axis(projection)
        rows = [_oriented(projection, getattr(units, part)) for part in parts]
        biases = [getattr(units, f"{part}_bias") for part in parts]
        bias = None if projection.bias is None else _appended(projection.bias.data, biases, 0)
        set_weights(projection, _appended(projection.weight.data, rows, axis), bias)
    down: Any = getattr(mlp, layout.down)
    set_weights(down, _appended(down.weight.data, [_oriented(down, units.down)], 1 - _hidden_axis(down)), None)
    _set_width(mlp, layout)


def truncate(mlp: nn.Module, layout: MLPLayout, n: int) -> None:
    """Keep the first ``n`` hidden units of ``mlp``, in place. This undoes `widen` bit for bit."""
    for projection, parts in _in_projections(mlp, layout):
        axis = _hidden_axis(projection)
        bias = None if projection.bias is None else _first(projection.bias.data, n, parts=len(parts), axis=0)
        set_weights(projection, _first(projection.weight.data, n, parts=len(parts), axis=axis), bias)
    down: Any = getattr(mlp, layout.down)
    set_weights(down, _first(down.weight.data, n, parts=1, axis=1 - _hidden_axis(down)), None)
    _set_width(mlp, layout)


def _in_projections(mlp: nn.Module, layout: MLPLayout) -> list[tuple[Any, tuple[str, ...]]]:
    """Return each projection into the hidden units, and the names of the parts that its matrix holds, in order."""
    up = getattr(mlp, layout.up)
    if layout.fused:
        return [(up, ("gate", "up"))]
    return [(up, ("up",))] if layout.gate is None else [(getattr(mlp, layout.gate), ("gate",)), (up, ("up",))]


def _hidden_axis(projection: nn.Module) -> int:
    return 1 if isinstance(projection, Conv1D) else 0  # of the weight, for features that come out


def _oriented(projection: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(projection, Conv1D) else weight


def _appended(tensor: Tensor, extras: list[Tensor], axis: int) -> Tensor:
    """Append to each of the equal parts of ``tensor`` (gate and up in a fused matrix, otherwise one) its own extra."""
    parts = zip(tensor.chunk(len(extras), axis), extras, strict=True)
    return torch.cat([piece for old, extra in parts for piece in (old, extra.detach().to(tensor))], axis)


def _first(tensor: Tensor, n: int, *, parts: int, axis: int) -> Tensor:
    return torch.cat([part.narrow(axis, 0, n) for part in tensor.chunk(parts, axis)], axis)


def set_weights(projection: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Set new values under the same Parameter objects, so that an optimizer's references stay valid."""
    for parameter, value in ((projection.weight, weight), (projection.bias, bias)):
        if value is not None:
            parameter.grad = None
            parameter.data = value
    if isinstance(projection, Conv1D):
        projection.nx, projection.nf = weight.shape
    else:
        projection.out_features, projection.in_features = weight.shape


def _set_width(mlp: Any, layout: MLPLayout) -> None:
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = count_hidden_units(mlp, layout)


def check_uniform(model: nn.Module) -> None:
    """Raise ValueError unless one field of the configuration gives the width of every MLP of ``model``."""
    if not isinstance(model, PreTrainedModel):
        return
    widths = {count_hidden_units(mlp, mlp_layout(mlp)) for mlp in find_mlps(model).values()}
    config, field = _width_field(model)
    configured = getattr(config, field, None) if field else None
    if field is None or len(widths) != 1 or configured not in (None, *widths):
        raise ValueError(
            f"the MLPs of {type(model).__name__} have the widths {sorted(widths)} and its configuration says "
            f"{field or _WIDTH_FIELDS} = {configured}: a plain checkpoint cannot describe the merged model. Keep the region "
            "as an adapter."
        )


def pad_to_widest(model: nn.Module) -> None:
    """Pad all MLPs of ``model`` to the widest with zero units, and write the width to its configuration."""
    mlps = [(mlp, mlp_layout(mlp)) for mlp in find_mlps(model).values()]
    widest = max(count_hidden_units(mlp, layout) for mlp, layout in mlps)
    for mlp, layout in mlps:
        missing = widest - count_hidden_units(mlp, layout)
        if missing:
            check_widenable(mlp, layout)
            widen(mlp, layout, HiddenUnits.zeros(missing, width(getattr(mlp, layout.down), "out")))
    if isinstance(model, PreTrainedModel):
        config, field = _width_field(model)
        assert field is not None, "check_uniform comes first"
        setattr(config, field, widest)


def _width_field(model: PreTrainedModel) -> tuple[PretrainedConfig, str | None]:
    """Return the configuration of a model's decoder, and the name of its field for the width of MLPs, if it has one."""
    config = model.config.get_text_config(decoder=True)
    return config, next((field for field in _WIDTH_FIELDS if hasattr(config, field)), None)
