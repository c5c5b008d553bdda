import copy

import pytest
from families import tiny
from peft import get_peft_model
from subspace_parts import subspace_file

from routed_peft.regions import RoutedConfig
from routed_peft.regions.targets import input_embeddings, plan_targets, unwrapped


@pytest.mark.parametrize("kind", ["mlp", "lora", "subspace"])
def test_a_plan_changes_neither_the_model_nor_the_configuration(kind, tmp_path):
    base = tiny("llama")
    fields = {"mlp": {"size": 4}, "lora": {}, "subspace": {"subspace": subspace_file(tmp_path)}}[kind]
    config = RoutedConfig(kind=kind, **fields)
    before, modules = copy.deepcopy(vars(config)), [(name, type(m)) for name, m in base.named_modules()]
    plan = plan_targets(base, config)
    assert vars(config) == before and [(name, type(m)) for name, m in base.named_modules()] == modules
    plan.write_to(config)
    assert config.target_modules == plan.target_modules is not None
    assert config.init == ("model" if kind == "mlp" else None)
    assert (config.provenance is not None) == (kind == "subspace") and config.store_base_part == (
        True if kind == "subspace" else None
    )
    assert kind == "subspace" or plan_targets(base, config) == plan, "a complete configuration has the same plan"


def test_a_plan_names_exactly_the_modules_that_peft_then_replaces():
    base = tiny("gpt2")
    plan = plan_targets(base, RoutedConfig(kind="lora", target_modules="all-linear", layers_to_transform=None))
    assert plan.targets == tuple(f"transformer.h.{i}.{name}" for i in (0, 1) for name in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    ))  # fmt: skip
    model = get_peft_model(base, RoutedConfig(kind="lora", target_modules="all-linear"), adapter_name="forget")
    assert sorted(model.base_model.targeted_module_names) == sorted(plan.targets)


def test_a_region_that_fits_nowhere_leaves_the_model_unchanged():
    base = tiny("llama")
    modules = [(name, type(m)) for name, m in base.named_modules()]
    with pytest.raises(ValueError, match=r"match no module of LlamaForCausalLM.*'model.layers.0.mlp'"):
        get_peft_model(base, RoutedConfig(size=4, target_modules=["nothing"]), adapter_name="forget")
    assert [(name, type(m)) for name, m in base.named_modules()] == modules


def test_wrappers_are_off_within_the_block_only():
    model = get_peft_model(tiny("llama"), RoutedConfig(size=4), adapter_name="forget")
    wrapped = model.base_model.model.model.layers[0].mlp
    with unwrapped(model, "lora"):
        assert model.base_model.model.model.layers[0].mlp is wrapped.base_layer
    assert model.base_model.model.model.layers[0].mlp is wrapped


def test_the_embeddings_that_start_the_residual_stream():
    assert list(input_embeddings(tiny("gpt2"), 16)) == ["transformer.wte", "transformer.wpe"]
    assert list(input_embeddings(tiny("llama"), 16)) == ["model.embed_tokens"] and not input_embeddings(
        tiny("llama"), 8
    )
