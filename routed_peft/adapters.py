"""A model's PEFT adapters, and the modules through which they act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_LORA_OUTLETS = ("lora_B",)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's PEFT adapters, in the order in which they were added."""
    return list(getattr(model, "peft_config", {}))


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield the PEFT layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def region_outlets(layer: BaseTunerLayer) -> tuple[str, ...]:
    """Return the attributes of a PEFT layer whose outputs are its adapters' contributions.

    Raises:
        ValueError: for a PEFT type that has none that routing knows of.
    """
    outlets: tuple[str, ...] | None = getattr(
        layer, "region_outlets", _LORA_OUTLETS if isinstance(layer, LoraLayer) else None
    )
    if outlets is None:
        raise ValueError(f"regions are LoRA or ROUTED adapters; {type(layer).__name__} is another PEFT type")
    return outlets


def _outlets(model: nn.Module, regions: Iterable[str]) -> list[nn.Module]:
    """Return the modules through which all that ``regions`` contribute passes; ValueError where there are none such."""
    regions = list(dict.fromkeys(regions))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    known = sorted({name for layer in layers for name in _adapters(layer)})
    if not regions or set(regions) - set(known):
        raise ValueError(f"`regions` must be among {known}, the adapters of this model, got {regions}")
    found: list[nn.Module] = []
    for layer in layers:
        for region in _adapters(layer) & set(regions):
            if region in layer.merged_adapters:
                raise ValueError(
                    f"the region {region!r} is merged into the base weights: call `unmerge_adapter()` first"
                )
            modules = [
                getattr(layer, outlet)[region]
                for outlet in getattr(type(layer), "region_outlets", ("lora_B",))
                if region in getattr(layer, outlet, ())
            ]
            variant = isinstance(layer, LoraLayer) and region in layer.lora_variant
            if not modules or variant or isinstance(layer, MultiheadAttention | ParamWrapper):
                raise ValueError(
                    f"the region {region!r} has a {type(layer).__name__} layer of a sort that cannot be ablated: "
                    "regions are `RoutedConfig` adapters, or plain LoRA on linear and convolution layers (no "
                    "embeddings, no DoRA or other variants). Train it with one of these."
                )
            found += modules
    return found


def _adapters(layer: BaseTunerLayer) -> set[str]:
    holders = (getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names)
    return {name for holder in holders if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for name in holder}
