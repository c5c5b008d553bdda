from __future__ import annotations

import pytest
import torch
from routing_parts import batch_of, two_regions
from torch import nn

from routed_peft import presets
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting


def test_self_check_passes_and_reports():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})}, train_base=True)
    received = routing.self_check(batch)
    assert received["forget"] == {"base": False, "forget": True, "bio": True}
    assert received["retain"] == {"base": True, "forget": False, "bio": True}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{"joint": ["norms"]}, {"edges": "activations"}])
def test_self_check_leaves_no_gradient_behind(options):
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(
        model, presets.era() | {"b": Route(weights={"forget": 1.0, "bio": 1.0})}, train_base=True, **options
    )
    routing.self_check(batch)
    assert all(p.grad is None for p in model.parameters())


def test_self_check_finds_a_weight_read_from_outside():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})}, train_base=True)

    def fused(model, inputs):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        return (hidden @ model.base_model.model.lm_head.weight.t()).pow(2).mean()

    with pytest.raises(ValueError, match="must not train 'base'.*read outside"):
        routing.self_check(batch, fused)


def test_self_check_finds_a_dead_region():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})}, train_base=True)
    for name, p in model.named_parameters():
        if ".forget." in name:
            p.data.zero_()
    with pytest.raises(ValueError, match="should train 'forget', but no gradient arrived"):
        routing.self_check(batch)


class Fused(nn.Module):
    """A module that reads the weight of another past its forward, as fused experts and LoRA on parameters do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.linear.weight.t()


def leaking() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = two_regions("llama")
    attention = model.base_model.model.model.layers[1].self_attn
    attention.o_proj = Fused(attention.o_proj)
    return model, batch_of(2)


LEAK = (
    "all weights 0, gradient still reaches 'base_model.model.model.layers.1.self_attn.o_proj.linear.weight'. .*`joint`"
)


def test_self_check_names_a_parameter_that_no_weight_blocks():
    """No route has a weight of 0 for the base, so no label shows the leak."""
    model, batch = leaking()
    routes = {"forget": Route(weights={"base": -0.75, "bio": 0.5}), "b": Route(weights={"forget": 2.0})}
    with pytest.raises(ValueError, match=LEAK):
        GradientRouting(model, routes, train_base=True).self_check(batch)
    assert all(p.grad is None for p in model.parameters())
    model, _ = leaking()
    GradientRouting(model, presets.control(), train_base=True).self_check(batch)  # nothing is to be blocked


def test_self_check_names_the_parameter_that_a_label_must_not_train():
    model, batch = leaking()
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})}, train_base=True)
    with pytest.raises(
        ValueError, match="must not train 'base', but gradient arrived there. '.*linear.weight': read out"
    ):
        routing.self_check(batch)


def test_a_leak_is_found_without_a_trainer():
    """The first block that gives the base no weight at all shows it, also after blocks of mixed labels."""
    model, batch = leaking()
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})}, train_base=True)
    for labels in (["forget", "retain"], ["unlabeled", "retain"]):
        with routing(labels):
            model(**batch).loss.backward()
        model.zero_grad()
    with routing(["forget", "forget"]):
        pass  # no backward pass: nothing is known yet
    with pytest.raises(ValueError, match=LEAK), routing(["forget", "forget"]):
        model(**batch).loss.backward()


def test_a_loop_without_leaks_goes_on_and_is_looked_at_once():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route(weights={"bio": 1.0})}, train_base=True)
    for _ in range(2):
        with routing(["forget", "forget"]):
            model(**batch).loss.backward()  # the second time, gradients are there already
    assert routing._unproven == {"forget", "bio"}
