import warnings

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from regions_parts import PEFT_NOISE, Int8Linear, add_region, with_region
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft.regions.fingerprint import check_fingerprint, fingerprint

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_saving_and_loading_do_not_change_it(family, tmp_path):
    base = FAMILIES[family]()
    expected = fingerprint(base)
    assert expected["parameters"] == len(list(base.parameters()))
    base.save_pretrained(tmp_path)
    check_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    check_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), expected)
    model = with_region(base)
    add_region(model, "other", 2)
    for wrapped in (model, model.base_model, base):
        assert fingerprint(wrapped) == expected
    assert fingerprint(model.unload()) == expected


def test_lora_and_saved_modules_do_not_change_it():
    base = tiny("qwen3")
    expected = fingerprint(base)
    config = LoraConfig(target_modules=["up_proj", "q_proj"], modules_to_save=["norm"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="retain")
    assert fingerprint(model) == fingerprint(base) == expected


def test_a_merged_region_is_refused():
    model = with_region(tiny("llama"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['forget'\] are merged into the base weights.*unmerge_adapter"):
        fingerprint(model)


def test_it_says_what_differs():
    expected = fingerprint(tiny("llama"))
    with pytest.raises(ValueError, match=r"the structure differs .* Got a base with 21 tensors, .* Load the base"):
        check_fingerprint(tiny("llama", intermediate_size=26), expected)
    with pytest.raises(ValueError, match="the content differs"):
        check_fingerprint(tiny("llama", seed=1), expected)
    with pytest.raises(ValueError, match=r"`base_fingerprint` lacks \['content'\]"):
        check_fingerprint(tiny("llama"), {"parameters": 21, "structure": ""})


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_one_changed_weight_shows(data):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    before = fingerprint(model)
    parameter = data.draw(st.sampled_from(list(model.parameters())))
    with torch.no_grad():
        parameter.view(-1)[data.draw(st.integers(0, parameter.numel() - 1))] += 1.0
    after = fingerprint(model)
    assert after["content"] != before["content"] and after["structure"] == before["structure"]


def test_large_tensors_are_sampled_from_end_to_end():
    model = nn.Linear(1000, 200, bias=False)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[-20:] += 1.0
    assert fingerprint(model)["content"] != before["content"]


@pytest.mark.parametrize("kind", ["float16", "quantized", "meta"])
def test_where_values_cannot_be_compared_the_structure_still_is(kind):
    expected = fingerprint(tiny("llama"))

    def other(**overrides):
        base = tiny("llama", **overrides)
        if kind == "float16":
            return base.half()
        if kind == "meta":
            return base.to("meta")
        for layer in base.model.layers:
            layer.mlp.up_proj = Packed(layer.mlp.up_proj)
        return base

    assert fingerprint(other())["content"] is None
    with pytest.warns(UserWarning, match="only the names and shapes of its weights were compared"):
        check_fingerprint(other(), expected)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="the structure differs"):
        check_fingerprint(other(intermediate_size=26), expected)


class Packed(Int8Linear):
    """As four-bit weights are kept: a flat tensor of another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = nn.Parameter(self.weight.data.reshape(-1, 1), requires_grad=False)
