"""The placebo of ablation: random units of a model are silenced, as many as a region has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from routed_peft.architectures import find_mlps, output_projection


def silence_random_units(model: nn.Module, count: int, seed: int) -> None:
    """Silence ``count`` random hidden units of every MLP, by zeroing their columns of the down-projection, in place.

    Only an effect of ablation that is larger than this one's belongs to the region.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 1, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
    >>> silence_random_units(model, 5, seed=0)
    >>> int((model.model.layers[0].mlp.down_proj.weight == 0).all(0).sum())
    5
    """
    generator = torch.Generator().manual_seed(seed)
    mlps = find_mlps(model)
    if not mlps:
        problem = f"{type(model).__name__} has no MLP of a known layout"
        raise ValueError(f"{problem}: describe its MLPs with `register_mlp_layout`")
    for name, mlp in mlps.items():
        down: Any = output_projection(mlp)
        axis = 0 if isinstance(down, Conv1D) else 1  # of its inputs
        units = down.weight.shape[axis]
        if count >= units:
            raise ValueError(f"`count` must be below the units of every MLP, got {count}, and {name!r} has {units}")
        chosen = torch.randperm(units, generator=generator)[:count]
        with torch.no_grad():
            down.weight.index_fill_(axis, chosen.to(down.weight.device), 0.0)
