r"""``kind="norms"``: gains (and shifts) of normalization layers that belong to a region."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from routed_peft.regions.config import RegionKind, RoutedConfig, register_region_kind
from routed_peft.regions.layer import RoutedLayer


class Gain(nn.Module):
    """An elementwise gain and, where wanted, a shift; both start at zero."""

    def __init__(self, width: int, shift: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * weight + bias``; ``x`` is ``(..., D)``."""
        y = x * self.weight
        return y if self.bias is None else y + self.bias


class RoutedNorm(nn.Module, RoutedLayer):
    r"""A normalization layer, and the gains that regions add to its own.

    .. math:: y = (w + \textstyle\sum_r \delta_r) \odot n(x) + b + \sum_r \beta_r

    summed over the active regions ``r``, with :math:`n(x)` the normalized input and a shift :math:`\beta` where the layer
    has one. Layers that read their gain as :math:`1 + w` (Gemma) are recognized by trying them out.

    Args:
        base_layer: a module that multiplies a normalized input by a gain ``weight`` ``(D,)``; see `check_norm`.
        adapter_name: name of the first region.
        config: its configuration.
        model: the model that the layer belongs to.
    """

    adapter_layer_names: tuple[str, ...] = ("routed_gain",)
    other_param_names: tuple[str, ...] = ()
    region_outlets: ClassVar[tuple[str, ...]] = ("routed_gain",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: RoutedConfig, model: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        unit = _unit_gain(base_layer)
        assert unit is not None, "check_norm comes first"
        self.unit = unit
        self.routed_gain = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Tensor] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, model=model)
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: RoutedConfig, *, model: nn.Module) -> None:
        """Add the region ``adapter_name``, on the device of the layer; its contribution starts at zero."""
        assert adapter_name not in self.routed_gain
        self.routed_gain[adapter_name] = Gain(len(self.weight), getattr(self.base_layer, "bias", None) is not None)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the contributions of the active regions; ``x`` is ``(..., D)``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        active = [] if self.disable_adapters else self.active_adapters
        names = [name for name in active if name in self.routed_gain and name not in self.merged_adapters]
        if names:
            normalized = _with_gain(self.base_layer, x, self.unit)
            for name in names:
                gain = self.routed_gain[name]
                result = result + gain(self._cast_input_dtype(normalized, gain.weight.dtype)).to(result.dtype)  # type: ignore[arg-type]
        return result

    def check_mergeable(self) -> None:
        """Accept: gains are plain vectors."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the gains of regions to the layer's own.

        Args:
            safe_merge: raise ValueError on gains that are not finite.
            adapter_names: which regions; the active ones by default.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.routed_gain:
                continue
            for key, update in self.routed_gain[name].named_parameters():
                if safe_merge and not update.isfinite().all():
                    raise ValueError(f"the weights of the region {name!r} are not all finite: it was not merged")
                own = self.base_layer.get_parameter(key)
                self._unmerged.setdefault(key, own.data.clone())  # subtracting would leave rounding errors
                own.data += update.data
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove the gains of all merged regions; the layer is restored bit for bit."""
        for key, value in self._unmerged.items():
            self.base_layer.get_parameter(key).data.copy_(value)
        self._unmerged = {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "routed." + super().__repr__()


def _with_gain(norm: nn.Module, x: Tensor, gain: float) -> Tensor:
    """Return ``norm(x)`` with all gains set to ``gain`` and no shift."""
    own = {name: torch.full_like(p, gain if name == "weight" else 0.0) for name, p in norm.named_parameters()}
    result: Tensor = torch.func.functional_call(norm, own, (x,))
    return result


@torch.no_grad()
def _unit_gain(norm: nn.Module) -> float | None:
    """Return the gain with which ``norm`` only normalizes, 1 or 0 (Gemma); None where it is not linear in its gain."""
    weight = getattr(norm, "weight", None)
    names = {name for name, _ in norm.named_parameters()}
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not names <= {"weight", "bias"}:
        return None
    x = torch.arange(1.0, 1 + 2 * len(weight), device=weight.device, dtype=weight.dtype).reshape(1, 2, -1)
    outputs = [_with_gain(norm, x, gain).float() for gain in (0.0, 1.0, 2.0)]
    if any(y.shape != x.shape for y in outputs):
        return None
    if not outputs[0].any() and torch.equal(2 * outputs[1], outputs[2]):
        return 1.0
    return 0.0 if outputs[0].any() and torch.equal(2 * outputs[0], outputs[1]) else None


def norm_names(model: nn.Module) -> list[str]:
    """Return the names of a model's normalization layers, those of heads included."""
    return [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]


def check_norm(name: str, module: nn.Module) -> None:
    """Raise ValueError where ``module`` does not multiply a normalized input by a gain."""
    if _unit_gain(module) is None:
        raise ValueError(f"`norms` needs layers with a gain `weight` of one axis, got {name!r}, a "
                         f"{type(module).__name__}: leave `norms` out")  # fmt: skip


register_region_kind("norms", RegionKind(("norms",), norm_names, layer=RoutedNorm, check=check_norm))
