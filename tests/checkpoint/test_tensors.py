"""A wrapped model's own weights, and those of its adapters."""

from __future__ import annotations

import pytest
import torch
from checkpoint_parts import FAMILIES, KINDS, lora, wrapped
from families import tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from routed_peft.checkpoint.tensors import (
    adapter_configs,
    adapter_state_dict,
    check_keys,
    inner_model,
    load_adapter_tensors,
    plain_state_dict,
    read_tensors,
)


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_own_weights_have_the_names_and_values_of_the_model_without_adapters(kind, family):
    before = {name: tensor.clone() for name, tensor in tiny(family).state_dict().items()}
    model = wrapped(kind, family)
    for own in (plain_state_dict(model), plain_state_dict(model, model.state_dict())):
        assert own.keys() == before.keys() and all(torch.equal(own[name], before[name]) for name in before)


@KINDS
def test_an_adapter_is_written_and_read_back_alone(kind):
    model, other = wrapped(kind), wrapped(kind)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    changed = {name: p.clone() for name, p in other.named_parameters()}
    tensors = adapter_state_dict(model, "forget")
    assert tensors and not any("forget" in name or "bio" in name for name in tensors)
    load_adapter_tensors(other, "forget", tensors=tensors, what="the region")
    own = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert torch.equal(p, own[name] if ".forget." in name else changed[name]), name
    copies = adapter_state_dict(model, "forget")
    next(iter(copies.values())).zero_()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_state_dict(model, "forget").items())


def test_tensors_of_another_adapter_are_refused_and_nothing_is_loaded():
    model = wrapped("lora")
    tensors = adapter_state_dict(model, "forget")
    first, before = next(iter(tensors)), {name: p.clone() for name, p in model.named_parameters()}
    bad = {
        "lacks 1 tensors, such as": {name: t for name, t in tensors.items() if name != first},
        "has in addition 1 tensors, such as 'more'": {**tensors, "more": torch.zeros(1)},
        r"has the shape \(1,\), the model's is": {**tensors, first: torch.zeros(1)},
    }
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=message):
            load_adapter_tensors(model, "forget", tensors=wrong, what="the region")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_is_merged_or_replaced_or_missing_is_refused():
    model = wrapped("lora")
    with pytest.raises(ValueError, match="`state_dict` lacks 1 weights of the base, such as 'model.norm.weight'"):
        plain_state_dict(model, {k: v for k, v in model.state_dict().items() if "model.norm.weight" not in k})
    model.merge_adapter(["forget"])
    with pytest.raises(
        ValueError, match=r"the adapters \['forget'\] are merged into .* call `unmerge_adapter\(\)` first"
    ):
        plain_state_dict(model)
    copied = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "forget")
    with pytest.raises(ValueError, match="'lm_head' has a trained copy of itself"):
        plain_state_dict(copied)


def test_a_weight_that_is_tied_to_one_that_was_given_is_not_missing():
    model = wrapped("lora", "qwen3")
    gathered = {name: tensor for name, tensor in model.state_dict().items() if "lm_head" not in name}
    assert "model.embed_tokens.weight" in plain_state_dict(model, gathered)


def test_a_model_with_adapters_of_its_own_is_written_like_a_peft_model():
    """`add_adapter` of transformers leaves no wrapper."""
    base = tiny("llama")
    torch.manual_seed(0)
    base.add_adapter(lora(), "forget")
    names = adapter_state_dict(base, "forget")
    assert names.keys() == adapter_state_dict(get_peft_model(tiny("llama"), lora(), "forget"), "forget").keys()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in names.items()}
    load_adapter_tensors(base, "forget", tensors=zeros, what="the region")
    assert not any(tensor.any() for tensor in adapter_state_dict(base, "forget").values())
    assert plain_state_dict(base).keys() == tiny("llama").state_dict().keys()
    assert list(adapter_configs(base)) == ["forget"] and adapter_configs(tiny("llama")) == {}


def test_models_are_unwrapped_and_others_refused():
    model = wrapped("lora")
    assert inner_model(model) is model.get_base_model() is inner_model(model.get_base_model())
    with pytest.raises(TypeError, match="expected a PeftModel or a transformers model, got Linear: unwrap it first"):
        inner_model(nn.Linear(1, 1))


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    assert torch.equal(read_tensors(file)["a"], torch.ones(4))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or no safetensors file"):
        read_tensors(file)


def test_sets_of_names_must_be_equal():
    check_keys("it", ["a", "b"], ["b", "a"])
    with pytest.raises(ValueError, match="it lacks 2 tensors, such as 'b'"):
        check_keys("it", ["a"], ["c", "b", "a"])
    with pytest.raises(ValueError, match="it has in addition 1 tensors, such as 'b'"):
        check_keys("it", ["a", "b"], ["a"])
