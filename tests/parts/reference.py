"""The slow, obvious way to route: what the operators are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from routed_peft.ablation import ablated
from routed_peft.routes import Route


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token loss in the model's own precision: transformers' loss computes in float32.

    Fused attention takes an exponential of single precision whatever the dtype, hence the plain kernel.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def by_example(
    model: nn.Module, batch: Mapping[str, Tensor], routes: list[Route], groups: dict[str, str]
) -> dict[str, Tensor]:
    """One ordinary backward pass per example, its gradients multiplied by the example's weights, added up.

    ``routes`` has one entry per example; ``groups`` maps parameter names to groups.
    """
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in groups}
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    for i, route in enumerate(routes):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        share = int((one["labels"][:, 1:] != -100).sum()) / tokens
        model.zero_grad()
        with ablated(model, *route.ablated) if route.ablated else nullcontext():
            (loss_of(model, one) * share).backward()
        for name, p in model.named_parameters():
            if name in groups and p.grad is not None:
                total[name] += route.weight(groups[name]) * p.grad
    model.zero_grad()
    return total


def by_position(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    weights: dict[str, Tensor],
    groups: dict[str, str],
    absent: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Every position gets parameters of its own (copies), so that each gradient is known by position and then weighed.

    ``weights`` maps groups to ``(B, T)``, ``absent`` regions of kind mlp to the positions that they add nothing to.
    """
    b, t = batch["input_ids"].shape
    copies: dict[str, list[Tensor]] = {}
    originals = []

    def copy(name: str, p: Tensor) -> Tensor:
        leaf = p.detach().expand(b, t, *p.shape).clone().requires_grad_()
        copies.setdefault(name, []).append(leaf)
        return leaf

    names = {id(p): name for name, p in model.named_parameters()}  # tied weights: one name
    for module in model.modules():
        own = {k: p for k, p in module._parameters.items() if p is not None and names.get(id(p)) in groups}
        if own:
            originals.append(module)
            module.forward = _positional(module, {k: copy(names[id(p)], p) for k, p in own.items()}, b)
    for name, module in model.named_modules():
        if ".routed_down." in name:
            module.forward = _gated(module.forward, absent[name.rpartition(".")[2]])
    try:
        loss_of(model, batch).backward()
    finally:
        for module in originals:
            del module.forward
    return {
        name: sum(torch.einsum("bt,bt...->...", weights[groups[name]].to(leaf.dtype), leaf.grad) for leaf in leaves)
        for name, leaves in copies.items()
    }


def _gated(forward, absent: Tensor):
    return lambda x: torch.where(absent[:, :, None], 0.0, forward(x))


def _positional(module: nn.Module, own: dict[str, Tensor], b: int):
    bias = own.get("bias", 0.0)
    if isinstance(module, nn.Linear):
        return lambda x: torch.einsum("btd,btod->bto", x, own["weight"]) + bias
    if isinstance(module, Conv1D):
        return lambda x: torch.einsum("btd,btdo->bto", x, own["weight"]) + bias
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))

        def embed(ids: Tensor) -> Tensor:
            rows, columns = torch.arange(b)[:, None], torch.arange(ids.shape[1])
            return own["weight"][rows, columns, ids.expand(b, -1)] * scale

        return embed
    if isinstance(module, nn.LayerNorm):
        return lambda x: F.layer_norm(x, module.normalized_shape, eps=module.eps) * own["weight"] + bias

    def norm(x: Tensor) -> Tensor:  # RMSNorm and its kin, also (B, T, H, D) and (B, H, T, D)
        weight = own["weight"]
        if x.dim() == 4:
            weight = weight.unsqueeze(2 if x.shape[1] == weight.shape[1] else 1)
        saved, module._parameters = module._parameters, {"weight": weight}
        try:
            return type(module).forward(module, x)
        finally:
            module._parameters = saved

    return norm
