"""A tokenizer and models for the tests of subspaces."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from torch import nn

from routed_peft.data import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], vocab_size=258)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=3)


@pytest.fixture(scope="module")
def planted(tokenizer):
    """A model that reads and writes capital letters along one direction."""
    model = tiny("llama", vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=3)
    direction = nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(3)), dim=0)
    capitals = [tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    with torch.no_grad():
        model.model.embed_tokens.weight[capitals] += 3 * direction
        model.lm_head.weight[capitals] += 10 * direction
    return model
