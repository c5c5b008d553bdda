"""Models and modules that cannot be routed, refused by name."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from routed_peft.adapters import adapter_names, adapters_in, outlet_modules
from routed_peft.routes import check_region_name
from routed_peft.routing.groups import Member
from routed_peft.routing.layers import Routed


def check_model(
    model: nn.Module, regions: Collection[str], *, base_adapters: Collection[str], train_base: bool = False
) -> None:
    """Raise ValueError on models that cannot be routed, or whose forward passes would bypass the routing."""
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel shares one step's labels between threads: use one process per device (torchrun)")
    names = adapter_names(model)
    for adapter in base_adapters:
        if adapter not in names:
            raise ValueError(f"`base_adapters` has {adapter!r}; the adapters of this model are {names}")
    if not regions:
        raise ValueError(f"this model has no region: its adapters are {names}, `base_adapters` {list(base_adapters)}. "
                         'Add one with `get_peft_model(model, RoutedConfig(…), adapter_name="forget")` or a LoraConfig '
                         "of that name.")  # fmt: skip
    for name in (*base_adapters, *regions):
        check_region_name(name)
    configs: Any = model.peft_config
    for region in regions:
        if getattr(configs[region], "use_dora", False):
            raise ValueError(f"the adapter {region!r} uses DoRA, whose magnitudes cannot be routed: use plain LoRA")
    if train_base and getattr(model, "is_quantized", False):
        raise ValueError("`train_base=True` on a quantized model: its weights cannot be trained. Route into LoRA "
                         "regions, and name the adapters that stay in `base_adapters`")  # fmt: skip
    check_auxiliary_loss(model)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    embeddings = inner.get_input_embeddings() if isinstance(inner, PreTrainedModel) else None
    holding: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Routed):
            raise ValueError(f"a GradientRouting is attached to this model already ({name!r}): call its `detach()` "
                             "first, `trainer.routing.detach()` if it is a trainer's")  # fmt: skip
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(f"{name!r} is a copy made by `modules_to_save` or trainable tokens, which cannot be "
                             "removed as a region: train the base instead (`train_base=True`)")  # fmt: skip
        if isinstance(module, BaseTunerLayer):
            _check_layer(name, module, getattr(embeddings, "weight", None))
            holding.update(adapters_in(module))
    for adapter in (*regions, *base_adapters):
        if adapter not in holding:
            raise ValueError(
                f"the adapter {adapter!r} ({configs[adapter].peft_type}) has no layer in this model, so it cannot be routed: "
                "regions are `RoutedConfig` adapters or plain LoRA on linear layers"
            )


def _check_layer(name: str, layer: BaseTunerLayer, embeddings: torch.Tensor | None) -> None:
    if layer.merged:
        raise ValueError(f"adapters are merged into {name!r}: call `unmerge_adapter()` before routing")
    if layer.disable_adapters:
        raise ValueError(f"adapters are switched off in {name!r}: call `enable_adapter_layers()` before routing")
    if isinstance(layer, ParamWrapper):
        raise ValueError(f"{name!r} has LoRA on the parameter {layer.parameter_name!r} (`target_parameters`; fused "
                         "experts of a mixture), which is read outside its adapter's modules and cannot be routed: "
                         "leave it out, and target linear layers, such as those of attention (`target_modules`)")  # fmt: skip
    if isinstance(layer, MultiheadAttention):
        raise ValueError(f"{name!r} has LoRA on `nn.MultiheadAttention`, which reads weights outside their modules and "
                         "cannot be routed: leave it out of `target_modules`")  # fmt: skip
    variants = getattr(layer, "lora_variant", {})
    if variants:
        raise ValueError(f"{name!r} has a LoRA variant for {sorted(variants)}, but only plain LoRA can be routed: "
                         "train that")  # fmt: skip
    for adapter in adapters_in(layer):
        if not outlet_modules(layer, adapter) and not getattr(layer, "feeds_outlets", False):
            raise ValueError(f"the adapter {adapter!r} on {name!r} ({type(layer).__name__}) cannot be routed: regions "
                             "are `RoutedConfig` adapters or plain LoRA on linear layers. Leave it out of "
                             "`target_modules`")  # fmt: skip
    base = layer.get_base_layer()
    tied = embeddings is not None and getattr(base, "weight", None) is embeddings
    if tied and isinstance(layer, LoraLayer) and not isinstance(base, nn.Embedding):
        raise ValueError(f"{name!r} shares its weight with the embeddings, so LoRA on it cannot be merged without "
                         "changing them: leave it out of `target_modules`, or load the model with "
                         "`tie_word_embeddings=False`")  # fmt: skip


def check_auxiliary_loss(model: nn.Module, asked: bool = False) -> None:
    """Raise ValueError where routers (mixtures of experts) add a load-balancing loss with a coefficient other than zero.

    Such a loss depends on all rows of a batch together. The configuration of ``model`` may ask for it, or the caller of its
    forward pass (``asked``).
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = getattr(inner, "config", None)
    configs = [config, getattr(config, "text_config", None)]
    if not asked and not any(getattr(c, "output_router_logits", False) for c in configs):
        return
    coefficients = _coefficients([inner]) or _coefficients(configs)  # a model reads its own attribute, where it has one
    if coefficients and not any(coefficients.values()):
        return
    raise ValueError("`output_router_logits=True` adds the routers' load-balancing loss "
                     f"({coefficients or 'coefficient unknown'}), which depends on all rows of a batch, so forget rows "
                     "would train the base: set `model.config.output_router_logits = False` and do not pass it (in "
                     "TRL, `router_aux_loss_coef=0.0`)")  # fmt: skip


def _coefficients(places: Iterable[Any]) -> dict[str, float]:
    found = [item for place in places for item in vars(place or object).items()]
    ends = ("aux_loss_coef", "z_loss_coef")
    return {name: value for name, value in found if isinstance(value, int | float) and name.endswith(ends)}


def check_member(member: Member) -> None:
    """Raise ValueError on a module whose forward pass would bypass the swapped class, or whose weights are too coarse."""
    if "forward" in member.module.__dict__ or hasattr(member.module, "_hf_hook"):
        raise ValueError(f"{member.name!r} has a forward of its own (`device_map` hooks, Liger or a kernel were put on "
                         "the instance), which would bypass the routing: load the model without `device_map` offload "
                         "and without such patches")  # fmt: skip
    if type(member.module).__module__.startswith("liger_kernel"):
        raise ValueError(
            f"{member.name!r} is a Liger module, which reads weights outside its forward: switch Liger off"
        )
    for name, p in member.module.named_parameters(recurse=False):
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"{member.name}.{name} is {p.dtype} and trained: small updates would be lost to rounding. "
                             "Load the model with `dtype=torch.float32` and train with `bf16=True` (autocast keeps "
                             "float32 masters)")  # fmt: skip


def check_covered(model: nn.Module, covered: Container[nn.Parameter]) -> None:
    """Raise ValueError where a trainable parameter of ``model`` is not among those that have a group."""
    for name, p in model.named_parameters():
        if p.requires_grad and p not in covered:
            raise ValueError(f"the trainable parameter {name!r} cannot be routed: it belongs to no supported module; "
                             "freeze it")  # fmt: skip
