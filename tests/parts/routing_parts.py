"""A tiny model with two regions, its batches and routes, and checks of gradients and of refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from routed_peft import presets
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route, Routes
from routed_peft.routing.gradient_routing import GradientRouting

ROUTES = {
    "forget": Route(weights={"base": 0.0}),
    "retain": Route(ablated=("forget",)),
    "unlabeled": Route(),
    "era": Route(weights={"base": -0.75, "bio": 2.0}),
    "mixed": Route(weights={"forget": 0.25, "base": 0.5}, ablated=("bio",)),
}


def two_regions(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny(family, **overrides), RoutedConfig(size=5, init="model", task_type="CAUSAL_LM"), adapter_name="forget"
    )
    model.add_adapter("bio", RoutedConfig(size=3, init="model", task_type="CAUSAL_LM"))
    return model.to(dtype)


def batch_of(size: int, length: int = 6, seed: int = 3, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (size, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if padded:
        labels[0, -2:], mask[0, -2:], ids[0, -2:] = -100, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def group_names(model: nn.Module, routing: GradientRouting) -> dict[str, str]:
    ids = {id(p): group for group in routing.groups for p in routing.parameters(group)}
    return {name: ids[id(p)] for name, p in model.named_parameters() if id(p) in ids}


def assert_equal_grads(model: nn.Module, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() >= expected.keys()
    for name, reference in expected.items():
        assert (grads[name] - reference).abs().max() <= tolerance * scale, name


def refuse(message: str, model: nn.Module, routes: Routes | None = None, **options: Any) -> None:
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        GradientRouting(model, routes or presets.sgtm("forget"), **options)
    if "attached" not in message:
        assert classes == [type(m) for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]


def lora(name: str = "forget", **options: Any) -> nn.Module:
    return get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["up_proj"], **options), adapter_name=name)
