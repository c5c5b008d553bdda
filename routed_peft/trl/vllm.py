"""Weights for a vLLM engine: the base's own names, with adapters folded in. Tested with a stand-in for the engine only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from routed_peft.adapters import adapters_in, tuner_layers


def check_foldable(model: nn.Module, adapters: Collection[str]) -> None:
    """Refuse adapters that are more than an update of a weight: the engine has the base's shapes and operations only."""
    for name, layer in tuner_layers(model):
        if not (here := set(adapters_in(layer)) & set(adapters)):
            continue
        biased = isinstance(layer, LoraLayer) and any(layer.lora_bias.get(adapter) for adapter in here)
        if not hasattr(layer, "get_delta_weight") or biased:
            raise ValueError(
                f'`use_vllm` with the adapter {min(here)!r}: {name!r} is no linear update of a weight (`kind="mlp"` adds '
                'hidden units), so it cannot be folded into the engine\'s weights. Take `kind="lora"` or "subspace" '
                "(without bias), or set `use_vllm=False`"
            )


@torch.no_grad()
def folded_parameters(model: nn.Module, adapters: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    r"""Yield every parameter of the base under the name it has without adapters, :math:`W + \sum_a \Delta W_a`.

    The model is not touched: merging and unmerging every few steps, as TRL does, would leave rounding errors in the base.

    Regions left out of ``adapters``, which passed `check_foldable`, are ablated in the engine.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), "forget")
    >>> [name for name, _ in folded_parameters(model, ["forget"])]
    ['0.weight', '0.bias']
    """
    updated: dict[str, tuple[Any, list[str]]] = {}
    own: tuple[str, ...] = ()
    for name, layer in tuner_layers(model):
        here = adapters_in(layer)
        updated[f"{name}.base_layer.weight"] = (layer, [adapter for adapter in adapters if adapter in here])
        own += tuple(f"{name}.{attribute}." for attribute in (*layer.adapter_layer_names, *layer.other_param_names))
    for name, p in model.named_parameters():
        if name.startswith(own):
            continue
        owner, folded = updated.get(name, (None, []))
        value = p.data
        for adapter in folded:
            value = value + owner.get_delta_weight(adapter).to(value.device, value.dtype)
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), value
