import pytest
import torch
from families import FAMILIES, tiny
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from routed_peft.architectures import find_mlps, is_plain, mlp_forward, mlp_layout, verify_layout, width

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
UNSUPPORTED = {
    "opt": (SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers.0", "holds more than an MLP"),
    "bloom": (
        {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        "transformer.h.0.mlp",
        "adds the residual",
    ),
    "mixtral": (
        SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 2},
        "model.layers.0.mlp",
        "mixture-of-experts",
    ),
    "gpt_oss": (
        SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 2, "head_dim": 8},
        "model.layers.0.mlp",
        "mixture-of-experts",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recognized_and_its_layout_computes_what_the_mlp_computes(family):
    model = FAMILIES[family]()
    mlps = find_mlps(model)
    assert len(mlps) == 2
    for name, mlp in mlps.items():
        assert model.get_submodule(name) is mlp
        layout = mlp_layout(mlp)
        verify_layout(mlp, layout)
        x = torch.randn(2, 3, width(getattr(mlp, layout.up), "in"))
        torch.testing.assert_close(mlp_forward(mlp, layout, x), mlp(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_unsupported_architectures_say_why(model_type):
    sizes, where, why = UNSUPPORTED[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    assert find_mlps(model) == {}
    block = model.get_submodule(where)
    with pytest.raises(ValueError, match=f"{type(block).__name__} .*{why}.*Supported are gate_proj"):
        mlp_layout(block)


def test_an_mlp_is_found_through_adapters():
    model = inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), tiny("llama"), "a")
    mlp = find_mlps(model)["model.layers.0.mlp"]
    assert width(getattr(mlp, mlp_layout(mlp).up), "out") == 24


class Odd(nn.Module):
    """The names of a known MLP around something else."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act, self.dropout = nn.Linear(4, 6), nn.Linear(6, 4), nn.ReLU(), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class Residual(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def test_same_names_with_other_mathematics_are_refused():
    with pytest.raises(ValueError, match="Residual has the names of a known MLP but computes something else"):
        verify_layout(Residual(), mlp_layout(Residual()))


def test_verifying_ignores_dropout_and_leaves_modes_and_random_state_alone():
    mlp = Odd(dropout=0.9)
    mlp.act.eval()
    state = torch.get_rng_state()
    verify_layout(mlp, mlp_layout(mlp))
    assert mlp.training and mlp.dropout.training and not mlp.act.training
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_verified_on_the_meta_device():
    verify_layout(Residual().to("meta"), mlp_layout(Residual()))


def test_an_mlp_without_an_activation_is_refused():
    mlp = Odd()
    del mlp.act
    with pytest.raises(ValueError, match="without an activation"):
        mlp_layout(mlp)


def test_is_plain():
    assert is_plain(nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
    assert not is_plain(None)
    assert not is_plain(torch.zeros(1, dtype=torch.uint8))
