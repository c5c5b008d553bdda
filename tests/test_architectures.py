import pytest
import torch
from families import FAMILIES, tiny
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from routed_peft import GradientRouting, RoutedConfig, architectures, presets
from routed_peft.architectures import (
    MLP_TARGETS,
    MLPLayout,
    find_mlps,
    is_plain,
    mlp_forward,
    mlp_layout,
    register_mlp_layout,
    verify_layout,
    width,
)

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


class ToyConfig(PretrainedConfig):
    model_type = "toy_of_a_test"

    def __init__(self, hidden_size=8, intermediate_size=12, **fields):
        super().__init__(tie_word_embeddings=False, **fields)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size


class ToyMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.expand = nn.Linear(config.hidden_size, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, config.hidden_size)
        self.squash = nn.Tanh()

    def forward(self, x):
        return self.contract(self.squash(self.expand(x)))


class ToyModel(PreTrainedModel):
    """An architecture that this package has never seen."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(16, config.hidden_size)
        self.layers = nn.ModuleList([nn.ModuleDict({"feed": ToyMLP(config)}) for _ in range(2)])
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer["feed"](x)
        return x


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(
        architectures, "_LAYOUTS", {names: list(known) for names, known in architectures._LAYOUTS.items()}
    )
    monkeypatch.setattr(architectures, "_ACTIVATIONS", list(architectures._ACTIVATIONS))
    layout = MLPLayout(gate=None, up="expand", down="contract", act="squash")
    register_mlp_layout("toy_of_a_test", layout, targets=["feed"])
    yield layout
    del MLP_TARGETS["toy_of_a_test"]


def test_an_architecture_is_added_from_outside_and_trains_a_region(registered):
    torch.manual_seed(0)
    base = ToyModel(ToyConfig())
    assert (
        list(find_mlps(base)) == ["layers.0.feed", "layers.1.feed"] and mlp_layout(base.layers[0]["feed"]) == registered
    )
    model = get_peft_model(base, RoutedConfig(size=3), adapter_name="forget")
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
    x, target = torch.arange(4), torch.randn(4, 8)
    loss = lambda: (model(x) - target).square().mean()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        with routing(["forget"] * 4):
            step = loss()
            step.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".forget." in name for name in changed), "the base learned nothing"
    routing.detach()
    with torch.no_grad():
        expected = model(x)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected)
    assert merged.config.intermediate_size == 15


def test_an_architecture_needs_a_name_of_its_own(registered):
    with pytest.raises(ValueError, match="the model type 'toy_of_a_test' is registered already"):
        register_mlp_layout("toy_of_a_test", registered)


def test_a_layout_that_was_not_registered_is_refused_with_the_way_to_add_it():
    with pytest.raises(ValueError, match="ToyMLP .*`routed_peft.architectures.register_mlp_layout`"):
        mlp_layout(ToyMLP(ToyConfig()))
