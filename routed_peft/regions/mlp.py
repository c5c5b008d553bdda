"""``kind="mlp"``: extra hidden units beside an MLP, one set per region."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.architectures import mlp_layout, width
from routed_peft.regions.config import RoutedConfig
from routed_peft.regions.hidden_units import HiddenUnits, check_widenable, count_hidden_units, truncate, widen
from routed_peft.regions.layer import RoutedLayer
from routed_peft.regions.subspace import cut_beside


class RoutedMLP(nn.Module, RoutedLayer):
    r"""An MLP, and beside it the hidden units of regions.

    .. math:: y = \mathrm{MLP}(x) + \sum_r W_d^r \bigl(\sigma(W_g^r x) \odot W_u^r x\bigr)

    summed over the active regions ``r`` (without the gate where the MLP has none). This equals the MLP with a wider hidden
    layer, whose extra units are kept apart by region. Regions compute in the dtype of their own weights.

    Args:
        base_layer: the MLP, of a layout that `routed_peft.architectures.mlp_layout` knows (ValueError otherwise).
        adapter_name: name of the first region.
        config: its configuration.
        model: the model that the MLP belongs to.
    """

    adapter_layer_names: tuple[str, ...] = ("routed_gate", "routed_up", "routed_down")
    other_param_names: tuple[str, ...] = ()
    region_outlets: ClassVar[tuple[str, ...]] = ("routed_down",)
    outer: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: RoutedConfig, model: nn.Module) -> None:
        super().__init__()
        self.layout = mlp_layout(base_layer)
        self.base_layer = base_layer
        self.routed_gate, self.routed_up, self.routed_down = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, model=model)
        self.train(base_layer.training)

    def update_layer(self, adapter_name: str, config: RoutedConfig, *, model: nn.Module) -> None:
        """Add the region ``adapter_name``, on the device and in the dtype of the MLP."""
        up, down = getattr(self.base_layer, self.layout.up), getattr(self.base_layer, self.layout.down)
        assert config.size is not None and adapter_name not in self.routed_up
        hidden = width(up, "in")
        bias = getattr(up, "bias", None) is not None
        self.routed_up[adapter_name] = nn.Linear(hidden, config.size, bias=bias)
        if self.layout.gated:
            gate = up if self.layout.gate is None else getattr(self.base_layer, self.layout.gate)
            bias = getattr(gate, "bias", None) is not None
            self.routed_gate[adapter_name] = nn.Linear(hidden, config.size, bias=bias)
        self.routed_down[adapter_name] = nn.Linear(config.size, width(down, "out"), bias=False)
        self._initialize(adapter_name, config, model)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    @torch.no_grad()
    def _initialize(self, adapter_name: str, config: RoutedConfig, model: nn.Module) -> None:
        down = self._linear("routed_down", adapter_name)
        if down.weight.is_meta:
            return  # its weights are about to be loaded
        if isinstance(model, PreTrainedModel):
            # of the MLP's own class, because GPT-2 scales its MLPs' output projection by depth
            like = _empty_like(self.base_layer)
            like.add_module(self.layout.up, self.routed_up[adapter_name])
            like.add_module(self.layout.down, down)
            if self.layout.gated:
                like.add_module(self.layout.gate or "gate", self.routed_gate[adapter_name])
            like.apply(model._init_weights)
        if config.init == "zero":
            down.weight.zero_()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        return super()._get_base_layer_device_and_dtype(getattr(base_layer, self.layout.up))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the MLP's output plus the contributions of the active regions; ``x`` is ``(..., H)``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        writer = getattr(self.base_layer, self.layout.down)
        for name in self.active_adapters:
            if name in self.routed_up and name not in self.merged_adapters:
                output = output + cut_beside(writer, self._contribution(name, x)).to(output.dtype)
        return output

    def _contribution(self, name: str, x: Tensor) -> Tensor:
        x = self._cast_input_dtype(x, self._linear("routed_up", name).weight.dtype)
        act = getattr(self.base_layer, self.layout.act)
        if self.layout.gated:
            hidden = act(self.routed_gate[name](x)) * self.routed_up[name](x)
        else:
            hidden = act(self.routed_up[name](x))
        return self.routed_down[name](hidden)

    def check_mergeable(self) -> None:
        """Raise ValueError where the MLP is quantized."""
        check_widenable(self.base_layer, self.layout)

    def check_unwrapped(self) -> None:
        """Raise ValueError where other regions sit inside the MLP: a merge would change the widths that they rely on."""
        inside = [name for name, child in self.base_layer.named_children() if isinstance(child, BaseTunerLayer)]
        if inside:
            raise ValueError(
                f"hidden units cannot be merged while {inside} inside the MLP hold regions of another kind: use "
                "`merge_and_unload(adapter_names=[…])`, or `routed_peft.export`"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append the hidden units of regions to the MLP's own.

        Args:
            safe_merge: raise ValueError on weights that are not finite.
            adapter_names: which regions, in this order; the active ones by default.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.routed_up]
        if not names:
            return
        self.check_mergeable()
        self.check_unwrapped()
        for name in names:
            units = self._units(name)
            if safe_merge and not all(t.isfinite().all() for t in (units.up, units.down, units.gate) if t is not None):
                raise ValueError(f"the weights of the region {name!r} are not all finite: it was not merged")
            widen(self.base_layer, self.layout, units)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove the units of all merged regions; the MLP is restored bit for bit."""
        added = sum(self._linear("routed_up", name).out_features for name in self.merged_adapters)
        if added:
            truncate(self.base_layer, self.layout, count_hidden_units(self.base_layer, self.layout) - added)
        self.merged_adapters.clear()

    def _units(self, name: str) -> HiddenUnits:
        up, down = self._linear("routed_up", name), self._linear("routed_down", name)
        gate = self._linear("routed_gate", name) if self.layout.gated else None
        gate_weight, gate_bias = (None, None) if gate is None else (gate.weight, gate.bias)
        return HiddenUnits(up.weight, down.weight, gate_weight, up.bias, gate_bias)

    def __repr__(self) -> str:
        return "routed." + super().__repr__()


def _empty_like(module: nn.Module) -> nn.Module:
    empty = type(module).__new__(type(module))
    nn.Module.__init__(empty)
    return empty
