from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from routed_peft.unlearning.weight_noise import _fresh, add_noise, initialization, shrink_perturb

SHARE = st.floats(0, 1)
SHAPE = st.lists(st.integers(1, 4), min_size=0, max_size=4)


@given(SHAPE, SHARE, SHARE, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_formula_holds_for_every_shape(shape, alpha, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    theta, mean, noise = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    got = shrink_perturb(theta, mean, init_noise=noise, alpha=alpha, beta=beta)
    assert got.shape == theta.shape and got.dtype == theta.dtype
    assert torch.allclose(got, (1 - alpha) * theta + alpha * mean + alpha * beta * noise, atol=1e-12)
    assert torch.equal(shrink_perturb(theta, mean, init_noise=noise, alpha=0.0, beta=beta), theta)
    assert torch.allclose(shrink_perturb(mean, mean, init_noise=noise, alpha=alpha, beta=0.0), mean, atol=1e-12), (
        "its start is a fixed point"
    )


def test_narrow_types_are_computed_wide():
    theta = torch.full((3,), 1.0, dtype=torch.bfloat16)
    got = shrink_perturb(theta, torch.ones(3), init_noise=torch.zeros(3), alpha=0.3, beta=1.0)
    assert got.dtype == torch.bfloat16 and torch.equal(got, theta), "0.7 rounded to bfloat16 plus 0.3 would not be 1"


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_at_alpha_0_and_everything_is_fresh_at_1(family):
    model = tiny(family, seed=3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_noise(model, 0.0, beta=1.0, seed=5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    add_noise(model, 1.0, beta=1.0, seed=5)
    fresh = dict(_fresh(model, 5).named_parameters())
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in model.named_parameters())


ONE = ("norm", "ln_")


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gpt_neox"])
def test_every_parameter_shrinks_towards_its_own_start(family):
    """Norm weights start from 1, but from 0 in Gemma, which computes 1 + w; biases and matrices start from 0."""
    model = tiny(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    add_noise(model, 0.5, beta=0.0)
    seen = set()
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and name.endswith("weight") and any(part in name for part in ONE)
        start = 1.0 if is_norm and family != "gemma" else 0.0
        seen.add((is_norm, start))
        assert torch.allclose(parameter, 0.5 * before[name] + 0.5 * start), name
    assert (True, 0.0 if family == "gemma" else 1.0) in seen and (False, 0.0) in seen


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_norms_compute_the_identity_scale_when_all_is_forgotten(family):
    model = tiny(family)
    add_noise(model, 1.0, beta=0.0)
    norm = next(module for name, module in model.named_modules() if name.endswith(("input_layernorm", "ln_1")))
    x = torch.randn(2, 3, 16)
    wanted = nn.functional.rms_norm(x, (16,), eps=1e-6) if family != "gpt2" else nn.functional.layer_norm(x, (16,))
    assert torch.allclose(norm(x), wanted, atol=1e-3)


def test_noise_has_the_scale_of_the_models_own_initialization():
    """GPT-2 initializes its residual projections more narrowly than the rest."""
    model = tiny("gpt2", n_embd=64, n_layer=8, initializer_range=0.02)
    for parameter in model.parameters():
        parameter.data.zero_()
    add_noise(model, 1.0, beta=0.5)
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.01 / 16**0.5, rel=0.05)


@pytest.mark.parametrize("family", ["gpt2", "gemma", "qwen3"])
def test_tied_weights_are_noised_once(family):
    model = tiny(family)
    before = model.get_input_embeddings().weight.clone()
    add_noise(model, 0.5, beta=0.0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.allclose(model.get_input_embeddings().weight, 0.5 * before), "twice would leave a quarter"


def test_the_seed_alone_decides_and_the_global_state_stays():
    first, second, other = (tiny("llama") for _ in range(3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    add_noise(first, 0.5, beta=0.5, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    add_noise(second, 0.5, beta=0.5, seed=7)
    add_noise(other, 0.5, beta=0.5, seed=8)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


class Exotic(nn.Module):
    """Vectors with random starts around -4, a constant table, and a padding row."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.step = nn.Parameter(torch.randn(500) * 0.1 - 4.0)
        self.table = nn.Parameter(torch.arange(12.0).view(3, 2, 2))
        self.embedding = nn.Embedding(9, 4, padding_idx=0)


def test_means_of_unusual_initializations():
    found = {name: (mean, noise) for name, mean, noise in initialization(Exotic(None), seed=0)}  # type: ignore[arg-type]
    assert torch.allclose(found["step"][0], torch.full((500,), -4.0), atol=0.02)
    assert torch.equal(found["table"][0], torch.arange(12.0).view(3, 2, 2)) and not found["table"][1].any()
    mean, noise = found["embedding.weight"]
    assert not mean.any() and not noise[0].any() and noise[1:].abs().min() > 0


@pytest.mark.parametrize(
    ("alpha", "beta", "name"), [(-0.1, 0.0, "alpha"), (0.5, 1.1, "beta"), (float("nan"), 0, "alpha")]
)
def test_shares_out_of_range(alpha, beta, name):
    with pytest.raises(ValueError, match=f"`{name}` must be between 0 and 1"):
        add_noise(tiny("llama"), alpha, beta=beta)


def test_a_model_that_is_not_what_its_configuration_says():
    model = tiny("llama")
    model.config.intermediate_size = 40
    with pytest.raises(ValueError, match="its configuration have different parameters"):
        add_noise(model, 0.5, beta=0.5)
    adapted = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).get_base_model()
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match="merge adapters first"):
        add_noise(adapted, 0.5, beta=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())
