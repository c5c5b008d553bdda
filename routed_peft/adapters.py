"""A model's PEFT adapters, their outlets, and the record of how the model was routed.

An *outlet* of an adapter is a module inside a PEFT layer whose output is what the adapter adds to the layer's own, such as
``lora_B[name]``. With the outputs of all its outlets multiplied by zero, the adapter is ablated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from routed_peft.routes import Routes


@dataclass(frozen=True)
class RoutingRecord:
    """Record of a model's routing: plain data that stays on the model, for saving and measuring it.

    Attributes:
        routes: label -> `Route`, or None where they are not known.
        train_base: whether the model's own weights were trained, so that saving adapters alone would lose them.
        base_adapters: adapters that belong to the base.
        kept_regions: regions that are part of the model, as in a run without routing: it is measured with them.
        continues_base: whether the model was loaded, for training, from a run that trained its base.
        scope: what of the base was routed, as the arguments of training are called: ``edges``, ``route_layers`` and
            ``joint``; None where it is not known.
    """

    routes: Routes | None = None
    train_base: bool = False
    base_adapters: tuple[str, ...] = ()
    kept_regions: tuple[str, ...] = ()
    continues_base: bool = False
    scope: Mapping[str, Any] | None = None


def routing_record(model: nn.Module) -> RoutingRecord:
    """Return the record that `GradientRouting` or `load_routed` left on ``model``; an empty one where there is none."""
    record: RoutingRecord = getattr(model, "_routed", RoutingRecord())
    return record


def set_routing_record(model: nn.Module, record: RoutingRecord) -> None:
    """Leave ``record`` on ``model``, as its one attribute of this library (``model._routed``)."""
    holder: Any = model
    holder._routed = record


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's PEFT adapters, in the order in which they were added."""
    return list(getattr(model, "peft_config", {}))


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yield the PEFT layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapters_in(layer: BaseTunerLayer) -> list[str]:
    """Return the names of the adapters that have parameters in a PEFT layer."""
    holders = (getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names)
    named = (name for holder in holders if isinstance(holder, nn.ModuleDict | nn.ParameterDict) for name in holder)
    return list(dict.fromkeys(named))


def region_outlets(layer: BaseTunerLayer) -> tuple[str, ...]:
    """Return the names of a PEFT layer's attributes that hold outlets, each a ``ModuleDict`` by adapter.

    ValueError for a PEFT type other than LoRA and ROUTED, whose layers do not name any.
    """
    own: tuple[str, ...] | None = getattr(
        layer, "region_outlets", ("lora_B",) if isinstance(layer, LoraLayer) else None
    )
    if own is None:
        raise ValueError(f"a {type(layer).__module__}.{type(layer).__name__} layer cannot be ablated or routed: regions are "
                         "adapters made by `RoutedConfig` or `LoraConfig`")  # fmt: skip
    return own


def outlet_modules(layer: BaseTunerLayer, adapter: str) -> list[nn.Module]:
    """Return the outlets of ``adapter`` in a PEFT layer; ValueError as `region_outlets`."""
    containers = [getattr(layer, outlet, {}) for outlet in region_outlets(layer)]
    return [container[adapter] for container in containers if adapter in container]


def find_outlets(model: nn.Module, regions: Iterable[str]) -> list[nn.Module]:
    """Return all outlets of ``regions`` in ``model``; ValueError on an unknown or merged one, or one that acts past them."""
    regions = list(dict.fromkeys(regions))
    layers = [layer for _, layer in tuner_layers(model)]
    known = sorted({name for layer in layers for name in adapters_in(layer)})
    if not regions or set(regions) - set(known):
        raise ValueError(f"`regions` must be among {known}, the adapters of this model, got {regions}")
    found: list[nn.Module] = []
    for layer in layers:
        for region in (name for name in adapters_in(layer) if name in regions):
            if region in layer.merged_adapters:
                raise ValueError(f"the region {region!r} is merged into the base weights: call `unmerge_adapter()` "
                                 "first")  # fmt: skip
            modules = outlet_modules(layer, region)
            variant = isinstance(layer, LoraLayer) and region in layer.lora_variant
            elsewhere = getattr(layer, "feeds_outlets", False)
            if not (modules or elsewhere) or variant or isinstance(layer, MultiheadAttention | ParamWrapper):
                raise ValueError(f"the region {region!r} has a {type(layer).__name__} layer that cannot be ablated: "
                                 "regions are `RoutedConfig` adapters, or plain LoRA on linear and convolution layers "
                                 "(no embeddings, no DoRA or other variants). Train it as one of these.")  # fmt: skip
            found += modules
    return found


def guard_saving(model: nn.Module) -> None:
    """Have the transformers model inside ``model`` refuse to be saved or pushed by itself while it holds adapters.

    Its own ``save_pretrained`` and ``push_to_hub`` would write the weights of all regions. Once adapters are unloaded or
    merged, both work as ever.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else None
    for verb in ("save_pretrained", "push_to_hub") if inner is not None else ():
        setattr(inner, verb, MethodType(_unless_adapted(verb), inner))  # methods, so that a deep copy guards itself


def _unless_adapted(verb: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if names := sorted({name for _, layer in tuner_layers(self) for name in adapters_in(layer)}):
            raise ValueError(f"`{verb}` of the inner model would write the weights of its adapters {names}, regions "
                             "included: save the run with `routed_peft.save_routed(model, path)`, and write a model "
                             "without regions with `routed_peft.ablate(path, out)`")  # fmt: skip
        return getattr(type(self), verb)(self, *args, **kwargs)

    method.__name__ = verb  # by which a pickle finds it
    return method
