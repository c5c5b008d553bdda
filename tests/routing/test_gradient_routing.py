from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, tiny
from peft import LoraConfig, get_peft_model
from reference import by_example, by_position, loss_of
from routing_parts import ROUTES, assert_equal_grads, batch_of, group_names, two_regions
from torch import nn

from routed_peft import ablated, presets
from routed_peft.adapters import RoutingRecord
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting

# Their norms (GPT-Neo: its attention) compute in float32 even in a float64 model.
FLOAT32_NORMS = ("gpt_neo", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_one_example_at_a_time(family):
    model, batch = two_regions(family), batch_of(5)
    routing = GradientRouting(model, ROUTES, train_base=True)
    groups = group_names(model, routing)
    assert set(groups.values()) == {"base", "forget", "bio"} and all(p.requires_grad for p in model.parameters())
    with routing(list(ROUTES)):
        loss_of(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    routing.detach()
    assert all(not p.requires_grad for n, p in model.named_parameters() if "routed_" not in n)
    for p in model.parameters():
        p.requires_grad_(True)
    model.base_model.set_adapter(["forget", "bio"])
    expected = by_example(model, batch, list(ROUTES.values()), groups)
    for name, p in model.named_parameters():
        p.grad = grads[name]
    assert_equal_grads(model, expected, 1e-6 if family in FLOAT32_NORMS else 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_labels_equal_parameters_by_position(family):
    model, batch = two_regions(family), batch_of(3, length=5)
    labels = torch.randint(0, 5, (3, 5), generator=torch.Generator().manual_seed(3))
    labels[0, -2:] = -100
    assert len(labels[labels >= 0].unique()) == 5, "all routes, also those from whose positions a region is absent"
    routing = GradientRouting(model, ROUTES, train_base=True)
    groups = group_names(model, routing)
    with routing(labels):
        loss_of(model, batch).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    weights = {
        group: torch.tensor([r.weight(group) for r in ROUTES.values()], dtype=torch.float64)[labels.clamp(min=0)]
        for group in routing.groups
    }
    routing.detach()
    model.base_model.set_adapter(["forget", "bio"])
    absent = {
        region: torch.tensor([region in route.ablated for route in ROUTES.values()])[labels.clamp(min=0)]
        for region in ("forget", "bio")
    }
    expected = by_position(model, batch, weights, groups, absent)
    for name, p in model.named_parameters():
        p.grad = grads[name]
    assert_equal_grads(model, expected, 1e-6 if family in FLOAT32_NORMS else 1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_token_gate_removes_the_region_at_its_positions_only(family):
    model, batch = two_regions(family), batch_of(2, padded=False)
    routing = GradientRouting(model, ROUTES, train_base=True)
    labels = torch.full((2, 6), 2)
    labels[:, 3:] = 1  # retain: region `forget` ablated from position 3 on
    with torch.no_grad(), routing(labels):
        gated = model(**batch).logits
    with torch.no_grad():
        on = model(**batch).logits
    assert torch.equal(gated[:, :3], on[:, :3])
    assert not torch.allclose(gated[:, 3:], on[:, 3:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_regions_are_absent_from_the_examples_named(family):
    model, batch = two_regions(family), batch_of(3, padded=False)
    routing = GradientRouting(model, ROUTES, train_base=True)
    rows = torch.tensor([True, False, True])
    with routing.ablated({"forget": rows, "bio": rows & False}):
        mixed = model(**batch)
        assert not mixed.loss.requires_grad
        longer = model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    with torch.no_grad(), ablated(model, "forget"):
        off = model(**batch).logits
    with torch.no_grad():
        on = model(**batch).logits
    assert torch.allclose(mixed.logits[rows], off[rows], atol=1e-12) and not torch.allclose(on[rows], off[rows])
    assert torch.allclose(mixed.logits[~rows], on[~rows], atol=1e-12) and longer.shape == (3, 8)
    with pytest.raises(ValueError, match=r"has \['bo'\]; the regions are"), routing.ablated({"bo": rows}):
        pass
    with pytest.raises(ValueError, match="cannot be used within"), routing(["forget"] * 3), routing.ablated({}):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_bit_equal_where_nothing_is_ablated(family, dtype):
    model, batch = two_regions(family, torch.float32), batch_of(4)
    model.base_model.set_adapter(["forget", "bio"])
    context = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with context:
        plain = model(**batch).logits
    routing = GradientRouting(model, ROUTES, train_base=True)
    for labels in (["forget", "era", "unlabeled", "forget"], torch.randint(0, 3, (4, 6)) * 3 % 5 % 4):
        labels = torch.where(labels == 1, 0, labels) if isinstance(labels, torch.Tensor) else labels
        with routing(labels), context:
            routed = model(**batch).logits
        assert torch.equal(routed, plain)
    routing.detach()


@pytest.mark.parametrize("train_base", [True, False])
def test_lora_regions_with_a_retain_adapter(train_base):
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), adapter_name="retain"
    )
    model.add_adapter("forget", LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    model.base_model.set_adapter(["retain", "forget"])  # one that is not new and switched off is refused
    model, batch = model.double(), batch_of(3)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=train_base, base_adapters=["retain"])
    groups = group_names(model, routing)
    assert {g for n, g in groups.items() if ".retain." in n} == {"base"}
    assert any("lora" not in n for n in groups) == train_base
    with routing(["forget", "retain", "unlabeled"]):
        loss_of(model, batch).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    expected_routes = list(presets.sgtm("forget").values())
    routing.detach()
    for name, p in model.named_parameters():
        p.requires_grad_(name in groups)
    model.base_model.set_adapter(["retain", "forget"])
    for name, p in model.named_parameters():
        p.requires_grad_(name in groups)
    expected = by_example(model, batch, expected_routes, groups)
    for n, p in model.named_parameters():
        p.grad = grads[n]
    assert_equal_grads(model, expected, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_nothing(family, reentrant):
    model, batch = two_regions(family), batch_of(5)
    model.train()
    routing = GradientRouting(model, ROUTES, train_base=True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.base_model.model.enable_input_require_grads()
        model.zero_grad()
        with routing(list(ROUTES)):
            model(**batch).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_gathering_changes_nothing():
    grads = []
    for gather in (True, False):
        model, batch = two_regions("llama"), batch_of(5)
        routing = GradientRouting(model, ROUTES, train_base=True, gather=gather)
        with routing(list(ROUTES)):
            loss_of(model, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-9, atol=1e-12) for n in grads[0])


def test_activation_edges_scale_what_flows_into_the_out_projection():
    """Base in-projections of the target layer are reversed, its out-projection and the other layer learn as usual."""
    model, batch = two_regions("gpt_neox"), batch_of(2, padded=False)
    names = [n for n, p in model.named_parameters()]
    routing = GradientRouting(
        model,
        presets.era() | {"b": Route(weights={"forget": 1.0, "bio": 1.0})},
        train_base=True,
        edges="activations",
        layers=[1],
    )
    grads = {}
    for label in ("unlabeled", "forget"):
        model.zero_grad()
        with routing([label] * 2):
            loss_of(model, batch).backward()
        grads[label] = {n: p.grad.clone() for n, p in model.named_parameters()}
    reversed_, equal = [], []
    for n in names:
        if torch.allclose(grads["forget"][n], -0.75 * grads["unlabeled"][n], atol=1e-12):
            reversed_.append(n)
        elif torch.equal(grads["forget"][n], grads["unlabeled"][n]):
            equal.append(n)
    assert {n.split("layers.")[1] for n in reversed_} == {
        "1.mlp.base_layer.dense_h_to_4h.weight", "1.mlp.base_layer.dense_h_to_4h.bias"
    }  # fmt: skip
    assert any("1.mlp.base_layer.dense_4h_to_h" in n for n in equal)
    assert any("1.mlp.routed_up.forget" in n for n in equal)
    routing.self_check(batch)


def test_training_without_labels_raises():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, ROUTES, train_base=True)
    with pytest.raises(ValueError, match="has no labels"):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    with routing.off():
        loss_of(model, batch).backward()
    with routing(["forget"] * 2), pytest.raises(ValueError, match="cannot be nested"), routing(["forget"] * 2):
        pass
    with pytest.raises(ValueError, match="has no labels"):
        model(**batch)


def test_detach_restores_everything_but_what_saving_needs():
    model = two_regions("qwen3", torch.float32)
    before = [(n, type(m)) for n, m in model.named_modules()], {n: p.requires_grad for n, p in model.named_parameters()}
    keys, active, attributes = list(model.state_dict()), model.active_adapters, set(vars(model))
    routing = GradientRouting(model, ROUTES, train_base=True)
    assert list(model.state_dict()) == keys and isinstance(model.get_submodule("base_model.model.lm_head"), nn.Linear)
    routing.detach()
    after = [(n, type(m)) for n, m in model.named_modules()], {n: p.requires_grad for n, p in model.named_parameters()}
    assert before == after and model.active_adapters == active
    left = set(vars(model)) - attributes
    assert left == {"_routed", "save_pretrained", "push_to_hub"}, (
        "the record, and the refusals to lose or publish weights"
    )
    scope = {"edges": "parameters", "route_layers": None, "joint": []}
    assert model._routed == RoutingRecord(routes=ROUTES, train_base=True, scope=scope)
    with pytest.raises(ValueError, match="detached"), routing(["forget"]):
        pass
    adapters_only = two_regions("qwen3", torch.float32)
    attributes = set(vars(adapters_only))
    GradientRouting(adapters_only, {"a": Route()}).detach()
    assert set(vars(adapters_only)) - attributes == {"_routed"}


def test_deepcopy_of_an_attached_model_runs():
    model, batch = two_regions("llama"), batch_of(2)
    GradientRouting(model, ROUTES, train_base=True)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)


def test_an_adapter_added_afterwards_raises():
    model = two_regions("llama")
    routing = GradientRouting(model, ROUTES, train_base=True)
    routing.detach()
    model = two_regions("llama")
    routing = GradientRouting(model, ROUTES, train_base=True)
    model.add_adapter("late", RoutedConfig(size=2))
    with pytest.raises(ValueError, match="the adapters were"), routing(["forget"]):
        pass


def test_save_pretrained_of_a_trained_base_raises(tmp_path):
    model = two_regions("llama")
    GradientRouting(model, ROUTES, train_base=True).detach()
    with pytest.raises(ValueError, match="save_routed"):
        model.save_pretrained(tmp_path)
