r"""``kind="heads"``: attention heads that belong to a region, beside those of the base.

A region adds key-value heads to an attention, each with as many query heads as the base's have. They are put behind the base's
own: rows of the query, key and value projections, columns of the output projection. The attention itself is left alone, since
it counts its heads by the width that it is given.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.architectures import width
from routed_peft.regions.attentions import (
    PROJECTIONS,
    append_heads,
    check_heads,
    check_projection,
    decoder_config,
    head_targets,
    head_width,
    loadable_heads,
)
from routed_peft.regions.config import RegionKind, RoutedConfig, register_region_kind
from routed_peft.regions.hidden_units import set_weights
from routed_peft.regions.layer import RoutedLayer
from routed_peft.regions.subspace import cut_beside


class RoutedHeads(nn.Module, RoutedLayer):
    r"""One projection of an attention, and the part of regions' heads that belongs there.

    .. math:: q = [W_q x; W_q^r x; \dots], \qquad y = W_o h + \sum_r W_o^r h^r

    and keys and values like queries, over the active regions ``r``; :math:`[h; h^r; \dots]` is what all heads together found.
    The four layers of an attention have the same regions, so they agree on what is present.

    Args:
        base_layer: one of the `PROJECTIONS` of an attention of ``model``.
        adapter_name: name of the first region.
        config: its configuration.
        model: the model that the layer belongs to.
    """

    adapter_layer_names: tuple[str, ...] = ("routed_heads", "routed_out")
    other_param_names: tuple[str, ...] = ()
    region_outlets: ClassVar[tuple[str, ...]] = ("routed_out",)
    outer: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: RoutedConfig, model: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        attention, part = _place(model, base_layer)
        self.is_output = part == "o_proj"
        self.head_width = head_width(attention, part)
        self.routed_heads, self.routed_out = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, model=model)
        self.train(base_layer.training)

    @property
    def feeds_outlets(self) -> bool:
        """Whether regions pass from here to an outlet in another layer: that of the output projection."""
        return not self.is_output

    @torch.no_grad()
    def update_layer(self, adapter_name: str, config: RoutedConfig, *, model: nn.Module) -> None:
        """Add the region ``adapter_name``, on the device and in the dtype of the projection."""
        assert config.heads is not None and adapter_name not in self._held
        base = self.get_base_layer()
        features, biased = config.heads * self.head_width, getattr(base, "bias", None) is not None
        own = (
            nn.Linear(features, width(base, "out"), bias=False)
            if self.is_output
            else nn.Linear(width(base, "in"), features, bias=biased)
        )
        self._held[adapter_name] = own
        if not own.weight.is_meta:  # otherwise its weights are about to be loaded
            if isinstance(model, PreTrainedModel):
                own.apply(model._init_weights)
            if self.is_output and config.init == "zero":
                own.weight.zero_()
        self._move_adapter_to_device_of_base_layer(adapter_name)

    @property
    def _held(self) -> nn.ModuleDict:
        return self.routed_out if self.is_output else self.routed_heads

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the heads' queries, keys or values side by side, or the sum of what they write; ``x`` is ``(..., D)``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters else self.active_adapters
        present = [name for name in active if name in self._held and name not in self.merged_adapters]
        if not present:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        own = {name: self._linear("routed_out" if self.is_output else "routed_heads", name) for name in present}
        if not self.is_output:
            result = self.base_layer(x, *args, **kwargs)
            heads = [linear(self._cast_input_dtype(x, linear.weight.dtype)) for linear in own.values()]
            return torch.cat([result, *(y.to(result.dtype) for y in heads)], -1)
        sizes = [linear.in_features for linear in own.values()]
        first, *others = x.split([x.shape[-1] - sum(sizes), *sizes], -1)
        result = self.base_layer(
            first.contiguous(), *args, **kwargs
        )  # as it lies without regions, for the same rounding
        for linear, part in zip(own.values(), others, strict=True):
            written = linear(self._cast_input_dtype(part, linear.weight.dtype))
            result = result + cut_beside(self.base_layer, written).to(result.dtype)
        return result

    def check_mergeable(self) -> None:
        """Raise ValueError where the projection is quantized."""
        check_projection(self.get_base_layer())

    def check_unwrapped(self) -> None:
        """Raise ValueError where another region updates the projection: a merge would change the width that it relies on."""
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"heads cannot be merged while the projection inside ({type(self.base_layer).__name__}) holds regions of "
                "another kind: use `merge_and_unload(adapter_names=[…])`, or `routed_peft.export`"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Append the heads of regions to the projection's own.

        Args:
            safe_merge: raise ValueError on weights that are not finite.
            adapter_names: which regions, in this order; the active ones by default.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self._held:
                continue
            self.check_mergeable()
            self.check_unwrapped()
            own = self._held[name]
            if safe_merge and not all(p.isfinite().all() for p in own.parameters()):
                raise ValueError(f"the weights of the region {name!r} are not all finite: it was not merged")
            append_heads(self.base_layer, own.weight, bias=own.bias, output=self.is_output)  # type: ignore[arg-type]
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove the heads of all merged regions; the projection is restored bit for bit."""
        if not self.merged_adapters:
            return
        base: Any = self.base_layer
        side = "in" if self.is_output else "out"
        kept = width(base, side) - sum(width(self._held[name], side) for name in self.merged_adapters)
        weight = base.weight.data[:, :kept] if self.is_output else base.weight.data[:kept]
        bias = None if self.is_output or base.bias is None else base.bias.data[:kept].clone()
        set_weights(base, weight.clone(memory_format=torch.contiguous_format), bias)
        self.merged_adapters.clear()

    def count(self, regions: list[str]) -> int:
        """Return how many key-value heads ``regions`` have here."""
        side = "in" if self.is_output else "out"
        return sum(width(self._held[name], side) for name in regions if name in self._held) // self.head_width

    def __repr__(self) -> str:
        return "routed." + super().__repr__()


def _place(model: nn.Module, projection: nn.Module) -> tuple[Any, str]:
    """Return the attention that holds ``projection``, and the name under which it does."""
    return next(
        (module, part) for module in model.modules() for part in PROJECTIONS if module._modules.get(part) is projection
    )


def plan_heads(model: nn.Module, regions: list[str]) -> int | None:
    """Return how many key-value heads each attention gets by a merge of ``regions``, or None where these have no heads.

    Raises:
        ValueError: as `loadable_heads`.
    """
    extra = max((layer.count(regions) for layer in model.modules() if isinstance(layer, RoutedHeads)), default=0)
    return loadable_heads(model, decoder_config(model).num_key_value_heads + extra) if extra else None


register_region_kind(
    "heads",
    RegionKind(("heads", "init"), head_targets, layer=RoutedHeads, check_together=check_heads),
)
