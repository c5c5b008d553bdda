from __future__ import annotations

import pytest
from routing_parts import batch_of, two_regions

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
