"""The group of every module that owns parameters: the base, a region, or the base modules that all data trains."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from routed_peft.adapters import region_outlets, tuner_layers
from routed_peft.architectures import layer_index
from routed_peft.routes import BASE

JOINT = "joint"
"""The group of base modules that all data trains."""


@dataclass(frozen=True, slots=True)
class Member:
    """A module that owns parameters, and their group."""

    name: str
    module: nn.Module
    group: str  # "base", a region, or "joint"
    adapter: str | None = None  # the PEFT adapter that it is part of
    outlet: bool = False  # whether it is an outlet of a region (see `routed_peft.adapters`), which a route may ablate


def find_members(
    model: nn.Module,
    base_adapters: Collection[str],
    *,
    joint: Collection[str] = (),
    layers: Collection[int] | None = None,
) -> list[Member]:
    """Assign every module that owns parameters to a group.

    ``base_adapters`` belong to the base. Base modules are joint if ``joint`` names them (``"embeddings"``, ``"norms"``,
    ``"head"``, or ends of module names), or where ``layers`` are given and they are outside these decoder layers.

    Raises:
        ValueError: where an adapter cannot be a region, or an entry of ``joint`` or ``layers`` matches nothing.
    """
    adapters = _adapter_modules(model)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = inner.get_output_embeddings() if "head" in joint and isinstance(inner, PreTrainedModel) else None
    matched: set[str | int] = set()
    members = []
    for name, module in model.named_modules():
        if not any(p is not None for p in module._parameters.values()):
            continue
        if module in adapters:
            adapter, outlet = adapters[module]
            group = BASE if adapter in base_adapters else adapter
            members.append(Member(name, module, group, adapter, outlet and group != BASE))
            continue
        hits = {pattern for pattern in joint if _is_joint(module, name, pattern=pattern, head=head)}
        index = layer_index(name)
        outside = layers is not None and index not in layers
        matched |= hits | (set() if index is None else {index})
        members.append(Member(name, module, JOINT if hits or outside else BASE))
    missing = [entry for entry in (*joint, *(layers or ())) if entry not in matched]
    if missing:
        raise ValueError(f"`joint` or `layers` has {missing[0]!r}, which matches no module of this model")
    return members


def _adapter_modules(model: nn.Module) -> dict[nn.Module, tuple[str, bool]]:
    found: dict[nn.Module, tuple[str, bool]] = {}
    for _, layer in tuner_layers(model):
        outlets = region_outlets(layer)
        for attribute in layer.adapter_layer_names:
            container = getattr(layer, attribute)
            if isinstance(container, nn.ModuleDict):
                for adapter, module in container.items():
                    found |= {m: (adapter, attribute in outlets) for m in module.modules()}
    return found


def _is_joint(module: nn.Module, name: str, *, pattern: str, head: nn.Module | None) -> bool:
    if pattern == "embeddings":
        return isinstance(module, nn.Embedding)
    if pattern == "norms":
        return type(module).__name__.endswith("Norm")
    if pattern == "head":
        return module is head
    return name == pattern or name.endswith("." + pattern)
