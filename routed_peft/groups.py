"""Which group every parameter of a model belongs to, and which models cannot be routed at all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from routed_peft.layers import Routed
from routed_peft.routes import BASE, check_region_name

JOINT = "joint"
"""The group of base modules that all data trains."""

_LORA_OUTLETS = ("lora_B",)
_LAYER_INDEX = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Member:
    """A module that owns parameters, and the group that these belong to.

    Attributes:
        name: qualified module name.
        module: the module itself.
        group: ``"base"``, a region, or ``"joint"``.
        adapter: the PEFT adapter it is part of, if any.
        outlet: whether its output is a region's contribution to the model.
    """

    name: str
    module: nn.Module
    group: str
    adapter: str | None = None
    outlet: bool = False


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


def find_members(
    model: nn.Module, base_adapters: Collection[str], joint: Collection[str], layers: Collection[int] | None
) -> list[Member]:
    """Assign every module that owns parameters to a group.

    Args:
        model: a PeftModel, or a transformers model with adapters.
        base_adapters: adapters that count as base.
        joint: ``"embeddings"``, ``"norms"``, ``"head"``, or ends of module names.
        layers: decoder layers whose base modules are routed; the others, embeddings and head are then joint.

    Raises:
        ValueError: where an adapter cannot be a region, or an entry of ``joint`` or ``layers`` matches nothing.
    """
    adapters = _adapter_modules(model)
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
        hits = {pattern for pattern in joint if _is_joint(model, name, module, pattern)}
        index = _LAYER_INDEX.search(f".{name}.")
        outside = layers is not None and (index is None or int(index[1]) not in layers)
        matched |= hits | ({int(index[1])} if index else set())
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


def _is_joint(model: nn.Module, name: str, module: nn.Module, pattern: str) -> bool:
    if pattern == "embeddings":
        return isinstance(module, nn.Embedding)
    if pattern == "norms":
        return type(module).__name__.endswith("Norm")
    if pattern == "head":
        return module is _head(model)
    return name == pattern or name.endswith("." + pattern)


def _head(model: nn.Module) -> nn.Module | None:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None


def check_model(
    model: nn.Module, regions: Collection[str], base_adapters: Collection[str], train_base: bool = False
) -> None:
    """Refuse models on which routing would be wrong or be passed by.

    Raises:
        ValueError: names the module or adapter, and what to do.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel shares one step's labels between threads: use one process per device (torchrun)")
    names = adapter_names(model)
    for adapter in base_adapters:
        if adapter not in names:
            raise ValueError(f"`base_adapters` has {adapter!r}; the adapters of this model are {names}")
    if not regions:
        raise ValueError(
            f"this model has no region: its adapters are {names}, `base_adapters` {list(base_adapters)}. Add one with "
            '`get_peft_model(model, RoutedConfig(…), adapter_name="forget")` or a LoraConfig of that name.'
        )
    for region in regions:
        check_region_name(region)
        configs: Any = model.peft_config
        if getattr(configs[region], "use_dora", False):
            raise ValueError(f"the adapter {region!r} uses DoRA, whose magnitudes cannot be routed: take plain LoRA")
    embeddings = _embedding_weight(model)
    if train_base and getattr(model, "is_quantized", False):
        raise ValueError(
            "`train_base=True` on a quantised model: its weights cannot be trained. Route into LoRA regions, with "
            "`base_adapters` for what stays"
        )
    for name, module in model.named_modules():
        if isinstance(module, Routed):
            raise ValueError(
                f"a GradientRouting is attached to this model already ({name!r}): call its `detach()` first, "
                "`trainer.routing.detach()` if it is a trainer's"
            )
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{name!r} is a copy made by `modules_to_save` or trainable tokens: it is no removable region"
            )
        if isinstance(module, BaseTunerLayer):
            _check_layer(name, module, embeddings)


def _embedding_weight(model: nn.Module) -> torch.Tensor | None:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    embeddings = inner.get_input_embeddings() if isinstance(inner, PreTrainedModel) else None
    return getattr(embeddings, "weight", None)


def _check_layer(name: str, layer: BaseTunerLayer, embeddings: torch.Tensor | None) -> None:
    if layer.merged:
        raise ValueError(f"adapters are merged into {name!r}: call `unmerge_adapter()` before routing")
    variants = getattr(layer, "lora_variant", {})
    if variants:
        raise ValueError(f"{name!r} has a LoRA variant for {sorted(variants)}: only plain LoRA can be routed")
    base = layer.get_base_layer()
    tied = embeddings is not None and getattr(base, "weight", None) is embeddings
    if tied and isinstance(layer, LoraLayer) and not isinstance(base, nn.Embedding):
        raise ValueError(
            f"{name!r} shares its weight with the embeddings, so LoRA on it cannot be merged without changing them: leave "
            "it out of `target_modules`, or load the model with `tie_word_embeddings=False`"
        )


def check_member(member: Member) -> None:
    """Refuse a module whose forward pass would go by the swapped class.

    Raises:
        ValueError: names the module and the culprit.
    """
    if "forward" in member.module.__dict__ or hasattr(member.module, "_hf_hook"):
        raise ValueError(
            f"{member.name!r} has a forward of its own (`device_map` hooks, Liger or a kernel were put on the instance), "
            "which would go by the routing: load the model without `device_map` offload and without such patches"
        )
    if type(member.module).__module__.startswith("liger_kernel"):
        raise ValueError(
            f"{member.name!r} is a Liger module, which reads weights outside its forward: switch Liger off"
        )
    for name, p in member.module.named_parameters(recurse=False):
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{member.name}.{name} is {p.dtype} and trained: small updates would round to nothing. Load the model with "
                "`dtype=torch.float32` and train with `bf16=True` (autocast keeps float32 masters)"
            )
