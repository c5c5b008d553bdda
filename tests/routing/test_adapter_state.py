"""Adapters that a routing finds, leaves frozen or refuses, and PEFT's verbs on an attached model."""

from __future__ import annotations

import pytest
import torch
from checkpoint_parts import frozen as frozen_run
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from routing_parts import batch_of, refuse
from torch import nn

from routed_peft import Route, RoutedConfig, load_routed, presets, save_routed
from routed_peft.routing.gradient_routing import GradientRouting

SGTM = presets.sgtm("forget")


def loras(*names: str, targets: tuple[str, ...] = ("up_proj",), init_lora_weights: bool = False) -> PeftModel:
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=init_lora_weights)
    model = get_peft_model(tiny("llama"), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def trained(model: nn.Module, adapter: str) -> set[bool]:
    return {p.requires_grad for name, p in model.named_parameters() if f".{adapter}." in name}


# Adapters that no route names


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("routes", [SGTM, presets.era(), {"a": Route(weights={"forget": 0.5})}])
def test_an_adapter_that_no_route_names_is_refused(train_base, routes):
    refuse(r"`base_adapters=\['retain'\]`", loras("retain", "forget"), routes, train_base=train_base, base_adapters=[])


def test_an_adapter_that_was_added_beside_the_others_is_refused():
    refuse(r"no route names \['other'\]", loras("retain", "forget", "other"), base_adapters=["retain"])


def test_regions_that_learn_from_everything_are_named_or_all_alike():
    named = {**SGTM, "unlabeled": Route(weights={"bio": 1.0})}
    routing = GradientRouting(loras("retain", "forget", "bio"), named, base_adapters=["retain"])
    assert routing.groups == ["base", "forget", "bio"]
    placebo = {"a": Route(weights={"forget": 1.0}), "b": Route()}
    assert GradientRouting(loras("forget", "bio"), placebo).groups == ["forget", "bio"]


@pytest.mark.parametrize("routes", [presets.era(), {"a": Route(weights={"base": 1.0})}])
def test_a_base_that_is_named_and_not_trained_is_refused(routes):
    refuse("name 'base', but no base is trained.*`train_base=True`.*`base_adapters", loras("forget"), routes)


# Frozen adapters


def loaded(tmp_path, name: str, model: nn.Module | None = None, **options) -> PeftModel:
    """A model with an adapter as PEFT loads it: for inference, unless told otherwise."""
    loras(name).save_pretrained(tmp_path)
    if isinstance(model, PeftModel):
        model.load_adapter(tmp_path / name, name, **options)
        return model
    return PeftModel.from_pretrained(tiny("llama"), tmp_path / name, adapter_name=name, **options)


def test_a_frozen_base_adapter_stays_frozen_though_peft_unfreezes_it(tmp_path):
    model = loaded(tmp_path, "retain")
    model.add_adapter("forget", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    refuse("no base is trained", model, {"f": Route(weights={"base": 0.0})}, base_adapters=["retain"])
    routing = GradientRouting(model, SGTM, train_base=True, base_adapters=["retain"])
    assert trained(model, "retain") == {False} and trained(model, "forget") == {True}
    before = {n: p.clone() for n, p in model.named_parameters() if ".retain." in n}
    with routing(["forget", "unlabeled"]):
        model(**batch_of(2)).loss.backward()
    torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_frozen_region_is_ablated_by_its_routes_and_not_trained(tmp_path):
    model = loaded(tmp_path, "forget")
    refuse(r"'forget' blocks everything.*frozen \['forget'\] with `is_trainable=True`", model, train_base=True)
    routes = {"retain": Route(ablated=("forget",)), "unlabeled": Route()}
    routing = GradientRouting(model, routes, train_base=True)
    assert routing.groups == ["base"] and trained(model, "forget") == {False}
    batch = batch_of(2, padded=False)
    with torch.no_grad(), routing(["retain", "unlabeled"]):
        logits = model(**batch).logits
    with torch.no_grad(), model.disable_adapter():
        off = model(**batch).logits
    assert torch.allclose(logits[0], off[0], atol=1e-6) and not torch.allclose(logits[1], off[1], atol=1e-6)
    routing.self_check(batch)


@pytest.mark.parametrize("freeze", ["by hand", "set_adapter"])
def test_an_adapter_frozen_in_other_ways_stays_frozen(freeze):
    model = loras("retain", "forget")
    model.base_model.set_adapter(["retain", "forget"], inference_mode=freeze == "set_adapter")
    for name, p in model.named_parameters():
        p.requires_grad_(".forget." in name)
    routing = GradientRouting(model, SGTM, train_base=True, base_adapters=["retain"])
    assert trained(model, "retain") == {False} and trained(model, "forget") == {True}
    routing.detach()
    for name, p in model.named_parameters():
        p.requires_grad_(".retain." in name or "lora_A.forget" in name)
    routing = GradientRouting(model, SGTM, base_adapters=["retain"])
    assert all("lora_A.forget" in n for n, p in model.named_parameters() if p.requires_grad and ".forget." in n)


def test_a_frozen_adapter_that_was_switched_on_beside_another_stays_frozen(tmp_path):
    model = loaded(tmp_path, "retain")
    model.add_adapter("forget", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["retain", "forget"])
    assert trained(model, "retain") == {True}, "PEFT unfreezes what it switches on"
    refuse("no base is trained", model, {"f": Route(weights={"base": 0.0})}, base_adapters=["retain"])
    routing = GradientRouting(model, SGTM, train_base=True, base_adapters=["retain"])
    assert trained(model, "retain") == {False} and trained(model, "forget") == {True}
    assert not {p for name, p in model.named_parameters() if ".retain." in name} & set(routing.parameters("base"))


def test_a_loaded_adapter_that_is_switched_off_is_refused(tmp_path):
    model = loras("forget")
    loaded(tmp_path, "other", model)
    for p in model.parameters():
        p.requires_grad_(False)
    routes = {**SGTM, "unlabeled": Route(weights={"other": 1.0})}
    for table in (SGTM, routes, presets.control()):
        refuse(r"'other' is loaded for inference and switched off.*delete_adapter\('other'\)", model, table)


def switched_off(tmp_path, how: str) -> nn.Module:
    """A model with `forget` loaded for training and then switched off, beside a new `retain`."""
    if how == "load_routed":
        trained = get_peft_model(tiny("llama"), RoutedConfig(size=2, init="model", task_type="CAUSAL_LM"), "forget")
        model = load_routed(save_routed(trained, tmp_path / "run"), ["forget"], is_trainable=True)
        model.add_adapter("retain", RoutedConfig(size=2, init="model", task_type="CAUSAL_LM"))
    else:
        trained = loras("forget", init_lora_weights=True)
        for name, p in trained.named_parameters():
            p.data += 0.1 * ("lora_B" in name)
        trained.save_pretrained(tmp_path)
        new = LoraConfig(r=2, target_modules=["up_proj"])
        model = get_peft_model(tiny("llama"), new, "retain")
        model.load_adapter(tmp_path / "forget", "forget", is_trainable=True)
    model.base_model.set_adapter("retain")
    return model


@pytest.mark.parametrize("how", ["load_routed", "load_adapter"])
def test_an_adapter_loaded_for_training_and_switched_off_is_refused(tmp_path, how):
    model = switched_off(tmp_path, how)
    message = r"'forget' was trained before and is switched off.*set_adapter\(\['retain', 'forget'\]\).*delete_adapter"
    refuse(message, model, base_adapters=["retain"])
    refuse(message, model, {"a": Route(weights={"base": 0.0})}, base_adapters=["forget"])
    model.base_model.set_adapter(["retain", "forget"])
    GradientRouting(model, SGTM, base_adapters=["retain"])
    assert trained(model, "forget") == {True}


def test_a_model_is_attached_to_again_though_its_new_adapter_was_off_at_first():
    model = loras("retain", "forget", init_lora_weights=True)
    for _ in range(2):
        routing = GradientRouting(model, SGTM, base_adapters=["retain"])
        assert trained(model, "forget") == {True}
        for name, p in model.named_parameters():
            p.data += 0.1 * ("lora_B" in name)
        routing.detach()
        assert model.active_adapters == ["retain"]


# What a saved run remembers


def test_a_continued_run_keeps_its_base_adapters(tmp_path):
    _, run = frozen_run(tmp_path)
    routing = GradientRouting(load_routed(run, ["forget"], is_trainable=True), SGTM)
    assert routing.base_adapters == ["retain"] and routing.regions == ["forget"] and not routing.train_base
    frozen = load_routed(run, ["forget"])
    refuse(r"frozen \['forget'\] with `is_trainable=True`", frozen)
    refuse(r"base_adapters=\['retain'\]", load_routed(run, ["forget"], is_trainable=True), base_adapters=[])


def test_a_continued_run_trains_its_base_again(tmp_path):
    model = get_peft_model(tiny("llama"), RoutedConfig(size=2, init="model", task_type="CAUSAL_LM"), "forget")
    run = save_routed(model, tmp_path / "run", train_base=True)
    routing = GradientRouting(load_routed(run, ["forget"], is_trainable=True), SGTM)
    assert routing.train_base and routing.groups == ["base", "forget"]
    refuse("'retain' blocks everything", load_routed(run, ["forget"], is_trainable=True), train_base=False)


# PEFT's verbs under way


def routed(kind: str = "lora") -> tuple[GradientRouting, nn.Module]:
    if kind == "lora":
        model = loras("retain", "forget")
        return GradientRouting(model, SGTM, base_adapters=["retain"]), model
    model = get_peft_model(tiny("llama"), RoutedConfig(size=2, init="model", task_type="CAUSAL_LM"), "forget")
    return GradientRouting(model, SGTM, train_base=True), model


def refused(routing: GradientRouting, message: str) -> None:
    with pytest.raises(ValueError, match=message), routing(["forget"]):
        raise AssertionError("the block must not begin")


VERBS = {
    "set_adapter": (lambda m: m.set_adapter("retain"), r"\['retain'\] of .*are active \(`set_adapter`\)"),
    "set_adapter of a layer": (
        lambda m: m.get_submodule("base_model.model.model.layers.1.mlp.up_proj").set_adapter("forget"),
        r"layers.1.mlp.up_proj' are active",
    ),
    "disable_adapter_layers": (
        lambda m: m.base_model.disable_adapter_layers(),
        r"switched off .*`enable_adapter_layers\(\)`",
    ),
    "merge_adapter": (lambda m: m.merge_adapter(["forget"]), r"\['forget'\] are merged into .*`unmerge_adapter\(\)`"),
    "unload": (lambda m: m.unload(), "are gone from"),
    "merge_and_unload": (lambda m: m.merge_and_unload(), "are gone from"),
    "delete_adapter": (lambda m: m.delete_adapter("retain"), "the adapters were"),
    "requires_grad": (
        lambda m: m.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.forget").requires_grad_(False),
        "lora_A.forget.weight requires no gradient any more",
    ),
    "an unfrozen base": (
        lambda m: m.get_submodule("base_model.model.lm_head").requires_grad_(True),
        "lm_head.weight requires a gradient now",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_of_peft_are_refused_in_the_next_step(verb):
    routing, model = routed()
    with routing(["forget"]):
        pass
    change, message = VERBS[verb]
    change(model)
    refused(routing, message)


def test_a_model_that_was_put_back_goes_on():
    routing, model = routed()
    model.set_adapter("retain")
    refused(routing, "are active")
    model.base_model.set_adapter(["retain", "forget"])
    with model.disable_adapter():
        refused(routing, "switched off")
    model.merge_adapter()
    refused(routing, "merged")
    model.unmerge_adapter()
    with routing(["forget"]):
        model(**batch_of(1)).loss.backward()


def test_merging_with_a_trained_base_is_refused_before_the_optimizer():
    """The merged MLP has another size, and fused AdamW would read beyond its state."""
    routing, model = routed("mlp")
    model.merge_adapter()
    refused(routing, "merged")
    with pytest.raises(ValueError, match="merged"):
        routing.check_adapters()


def test_adapters_that_are_switched_off_or_merged_are_refused_at_attaching():
    model = loras("forget")
    model.base_model.disable_adapter_layers()
    refuse(r"switched off in .*`enable_adapter_layers\(\)`", model, train_base=True)
