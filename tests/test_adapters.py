import pytest
import torch
from families import tiny
from peft import IA3Config, LoraConfig, get_peft_model
from regions_parts import add_region, with_region

from routed_peft.adapters import (
    RoutingRecord,
    adapter_names,
    adapters_in,
    find_outlets,
    outlet_modules,
    region_outlets,
    routing_record,
    set_routing_record,
    tuner_layers,
)


def test_the_outlets_of_hidden_units_are_their_output_projections():
    model = with_region(tiny("llama"))
    add_region(model, "bio", 3)
    layers = [layer for _, layer in tuner_layers(model)]
    assert (
        adapter_names(model) == ["forget", "bio"]
        and [adapters_in(layer) for layer in layers] == [["forget", "bio"]] * 2
    )
    assert find_outlets(model, ["bio"]) == [layer.routed_down["bio"] for layer in layers]
    assert find_outlets(model, ["forget", "bio"])[:2] == [layers[0].routed_down[name] for name in ("forget", "bio")]


def test_the_outlets_of_stock_lora_are_its_second_matrices():
    model = get_peft_model(tiny("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), "forget")
    layers = [layer for _, layer in tuner_layers(model)]
    assert find_outlets(model, ["forget"]) == [layer.lora_B["forget"] for layer in layers]
    assert outlet_modules(layers[0], "bio") == []


def test_another_peft_type_has_no_silent_default():
    model = get_peft_model(tiny("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "forget")
    layer = next(layer for _, layer in tuner_layers(model))
    for call in (lambda: region_outlets(layer), lambda: find_outlets(model, ["forget"])):
        with pytest.raises(ValueError, match=r"peft\.tuners\.ia3.* layer cannot be ablated or routed"):
            call()


def test_unknown_and_merged_regions_are_refused():
    model = with_region(tiny("llama"))
    with pytest.raises(ValueError, match=r"must be among \['forget'\].* got \['bio'\]"):
        find_outlets(model, ["bio"])
    with pytest.raises(ValueError, match=r"must be among \['forget'\].* got \[\]"):
        find_outlets(model, [])
    model.merge_adapter(["forget"])
    with pytest.raises(ValueError, match="call `unmerge_adapter"):
        find_outlets(model, ["forget"])


def test_the_record_stays_on_the_model():
    model = torch.nn.Linear(1, 1)
    assert routing_record(model) == RoutingRecord()
    record = RoutingRecord(train_base=True, base_adapters=("retain",))
    set_routing_record(model, record)
    assert routing_record(model) is record
