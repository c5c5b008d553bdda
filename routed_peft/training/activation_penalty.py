"""ERA's activation penalty: the L1 norm of MLP activations, of base and regions alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from routed_peft.adapters import adapters_in, outlet_modules, tuner_layers
from routed_peft.architectures import find_mlps, output_projection


@contextmanager
def activation_l1(model: nn.Module) -> Iterator[list[Tensor]]:
    r"""Collect the activation penalty of the forward passes inside.

    .. math:: \sum_{\text{layers}} \frac{1}{BT} \sum_{b,t} \lVert h_{bt} \rVert_1

    with h the activations that enter an MLP's out-projection, extra units included (gradient routing, arXiv 2410.04332,
    appendix on ERA). Its gradient is not routed. Yields a list that fills with one scalar per MLP and region and forward
    pass; ValueError under reentrant gradient checkpointing, where activations have no gradient when the loss is formed.
    """
    collected: list[Tensor] = []

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (h,) = inputs
        if torch.is_grad_enabled():
            collected.append(h.abs().sum() * (h.shape[-1] / h.numel()))
        elif module.training:
            raise ValueError("`activation_l1` needs activations with gradients: use non-reentrant gradient "
                             "checkpointing")  # fmt: skip

    mlps = find_mlps(model)
    sources = [output_projection(mlp) for mlp in mlps.values()]
    sources += [
        module
        for name, layer in tuner_layers(model)
        if name in mlps or f"{name}.base_layer" in mlps
        for adapter in adapters_in(layer)
        for module in outlet_modules(layer, adapter)
    ]
    handles = [module.register_forward_pre_hook(collect) for module in sources]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
