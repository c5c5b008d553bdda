from __future__ import annotations

import pytest
import torch
from families import tiny
from relearning_parts import state
from transformers import MixtralConfig, MixtralForCausalLM

from routed_peft.evaluation.relearning.attacked_model import quantize


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_leaves_so_many_values_for_each_output(family):
    victim = tiny(family)
    before = state(victim)
    quantize(victim, 4)
    after = victim.state_dict()
    name = "model.layers.0.mlp.up_proj.weight" if family == "llama" else "transformer.h.0.mlp.c_fc.weight"
    old, new = (s[name] if family == "llama" else s[name].T for s in (before, after))
    for row, rounded in zip(old, new, strict=True):
        step = float(row.abs().max()) / 7
        assert torch.allclose(rounded, (row / step).round() * step, atol=1e-6) and len(rounded.unique()) <= 15
    head = "lm_head.weight"
    assert torch.equal(after[head], before[head])


def test_experts_in_one_tensor_are_not_passed_over():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.experts.gate_up_proj' holds the weights of several experts"
    ):
        quantize(model, 8)
