"""Regions whose weights are all away from zero, biases too, so that mistakes in any of them show."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from routed_peft.regions import RoutedConfig, RoutedMLP

PEFT_NOISE = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""PEFT reads a name that transformers has renamed."""


def with_region(base: PreTrainedModel, name: str = "forget", size: int = 5, **fields: Any) -> PeftModel:
    """Wrap ``base`` with one region of random weights."""
    model = get_peft_model(base, RoutedConfig(size=size, task_type="CAUSAL_LM", **fields), adapter_name=name)
    randomize(model, name)
    return model.eval()


def add_region(model: PeftModel, name: str, size: int, **fields: Any) -> None:
    """Add another region of random weights, not active."""
    model.add_adapter(name, RoutedConfig(size=size, task_type="CAUSAL_LM", **fields))
    randomize(model, name)


def randomize(model: nn.Module, name: str) -> None:
    """Draw all weights of the region ``name`` anew."""
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def layers(model: nn.Module) -> list[RoutedMLP]:
    """Return the region layers of ``model``."""
    return [module for module in model.modules() if isinstance(module, RoutedMLP)]


class Int8Linear(nn.Linear):
    """Eight bits a weight and one scale, in the way of quantization libraries: the parameter is an integer tensor."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)
