from __future__ import annotations

import pytest
import torch
from families import tiny
from relearning_parts import model, state
from transformers import MixtralConfig, MixtralForCausalLM

from routed_peft.evaluation.relearning import Attack
from routed_peft.evaluation.relearning.attacked_model import AttackedModel, quantize


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
    mixture = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mlp.experts.gate_up_proj' holds the weights of several experts"
    ):
        quantize(mixture, 8)


def prepared(attack: str, seed: int, noise: int) -> list[torch.Tensor]:
    """Return the trained parameters at the start of an attack; ``noise`` seeds the random state that it finds."""
    torch.manual_seed(noise)
    attacked, expected = AttackedModel(model()), torch.get_rng_state()
    with attacked.prepared_for(Attack.parse(attack), seed) as parameters:
        found = [parameter.detach().clone() for parameter in parameters]
    assert torch.equal(torch.get_rng_state(), expected)
    return found


@pytest.mark.parametrize("attack", ["lora", "perturb", "perturb+lora"])
def test_adapters_and_noise_are_drawn_by_the_seed_alone(attack):
    same = lambda one, other: all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    first = prepared(attack, 0, noise=5)
    assert same(first, prepared(attack, 0, noise=6)) and not same(first, prepared(attack, 1, noise=5))


def test_the_model_is_given_back_with_its_modes_and_without_gradients():
    victim = model(torch.bfloat16).train()
    victim.lm_head.weight.requires_grad_(False)
    before = state(victim)
    attacked = AttackedModel(victim)
    with attacked.prepared_for(Attack.parse("forget"), 0) as parameters:
        assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in parameters)
        assert len(parameters) == len(list(victim.parameters())), "an attacker may train all of it"
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
            parameter.data += 1
        victim.eval()
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in victim.state_dict().items())
    attacked.release()
    after = victim.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert victim.training and not victim.lm_head.weight.requires_grad and victim.model.norm.weight.requires_grad
    assert all(parameter.grad is None for parameter in victim.parameters())
