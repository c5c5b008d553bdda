"""Random units silenced: as many as asked for, in every MLP, whichever way its weights lie, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from routed_peft.evaluation.placebo import silence_random_units


def llama():
    size = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **size)), lambda layer: layer.mlp.down_proj.weight


def gpt2():
    size = {"n_embd": 8, "n_inner": 12, "n_head": 2, "n_layer": 3, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, **size)), lambda layer: layer.mlp.c_proj.weight.T


@pytest.mark.parametrize("make", [llama, gpt2])
def test_units_are_silenced_in_every_layer(make):
    model, out = make()
    layers = model.model.layers if make is llama else model.transformer.h
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    silence_random_units(model, 5, seed=1)
    silent = [out(layer).eq(0).all(0) for layer in layers]
    assert [(len(units), int(units.sum())) for units in silent] == [(12, 5)] * 3
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 3 and all("down_proj" in name or "c_proj" in name for name in changed)
    other, _ = make()
    other.load_state_dict(before)
    silence_random_units(other, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_there_must_be_units_to_silence():
    with pytest.raises(ValueError, match="below the units of every MLP, got 12, and 'model.layers.0.mlp' has 12"):
        silence_random_units(llama()[0], 12, seed=0)
    with pytest.raises(ValueError, match="Linear has no MLP of a known layout"):
        silence_random_units(nn.Linear(2, 2), 1, seed=0)
