"""`ablated`: run a model without some of its regions within a block; `checkpoint.ablate` removes them for good."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from routed_peft.adapters import find_outlets


@contextmanager
def ablated(model: nn.Module, *regions: str, scale: float = 0.0) -> Iterator[None]:
    r"""Run ``model`` without ``regions`` within the block.

    A region's contribution to a layer, :math:`r(x)`, becomes :math:`s\,r(x)` with ``scale`` :math:`s`. At 0 it is exactly
    zero, even where the region's weights are not finite. Blocks nest, and their scales multiply. No `GradientRouting` is
    needed, no weight is moved or frozen, and training works inside. Compiled parts of the model run eagerly meanwhile.

    Args:
        model: a `PeftModel`, a transformers model with adapters, or a module that holds one.
        regions: adapter names; at least one.
        scale: 0 removes, 1 changes nothing.

    Raises:
        ValueError: on a scale that is not finite, an unknown or merged region, and adapters that cannot be ablated: LoRA
            on embeddings, parameters or ``nn.MultiheadAttention``, DoRA and other variants, other PEFT types.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> model = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False), "forget")
    >>> x = torch.ones(1, 2)
    >>> with ablated(model, "forget"):
    ...     same = torch.equal(model(x), model.get_base_model()[0].base_layer(x))
    >>> same
    True
    """
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number, got {scale}")
    modules = find_outlets(model, regions)

    def scaled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output) if scale == 0 else output * scale

    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # compiled code ignores new hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.callback(module.register_forward_hook(scaled).remove)
        yield
