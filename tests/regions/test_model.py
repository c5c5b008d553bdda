import pytest
import torch
from families import FAMILIES, tiny, tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from regions_parts import PEFT_NOISE, add_region, layers, randomize, with_region
from transformers import AutoConfig, AutoModelForCausalLM

from routed_peft.regions import RoutedConfig
from routed_peft.regions.fingerprint import fingerprint

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
X = tokens()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_every_way_of_loading(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = with_region(base, base_fingerprint=fingerprint(base))
    on = logits(model)
    model.save_pretrained(tmp_path)
    region = tmp_path / "forget"
    assert sorted(p.name for p in region.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    fresh = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), region, adapter_name="forget")), on)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), region)), on)
    lean = PeftModel.from_pretrained(fresh(), region, adapter_name="forget", low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), on)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(region, adapter_name="forget")), on)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(region)), on)
    trainable = PeftModel.from_pretrained(fresh(), region, adapter_name="forget", is_trainable=True)
    assert {n.split(".")[-3] for n, p in trainable.named_parameters() if p.requires_grad} <= {
        "routed_gate",
        "routed_up",
        "routed_down",
    }
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(fresh(), region).parameters())


def test_loading_onto_another_base_is_refused(tmp_path):
    base = tiny("llama")
    with_region(base, base_fingerprint=fingerprint(base)).save_pretrained(tmp_path)
    other = tiny("llama", seed=1)
    with pytest.raises(ValueError, match="the content differs"):
        PeftModel.from_pretrained(other, tmp_path / "forget", adapter_name="forget")
    assert not layers(other)


def test_a_second_region_is_loaded_beside_the_first(tmp_path):
    base = tiny("llama")
    model = with_region(base, "bio", base_fingerprint=fingerprint(base))
    add_region(model, "cyber", 3, base_fingerprint=fingerprint(base))
    model.base_model.set_adapter(["bio", "cyber"])
    on = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "bio", adapter_name="bio")
    loaded.load_adapter(tmp_path / "cyber", adapter_name="cyber")
    loaded.base_model.set_adapter(["bio", "cyber"])
    assert torch.equal(logits(loaded), on)


def test_transformers_own_add_adapter():
    model = tiny("gpt2")
    before = logits(model)
    model.add_adapter(RoutedConfig(size=3), adapter_name="forget")
    randomize(model, "forget")
    on = logits(model)
    assert not torch.equal(on, before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    assert torch.equal(logits(model), on)


def test_deleting_and_setting():
    model = with_region(tiny("llama"), "bio")
    bio = logits(model)
    add_region(model, "cyber", 3)
    model.delete_adapter("cyber")
    assert torch.equal(logits(model), bio) and not any("cyber" in name for name in model.state_dict())
    add_region(model, "cyber", 2)
    model.set_adapter("cyber")
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"cyber"}
    with pytest.warns(UserWarning, match="Setting active adapter to bio"):
        model.delete_adapter("cyber")
    assert torch.equal(logits(model), bio)


def test_generating_and_status():
    model = with_region(tiny("llama"))
    merged = with_region(tiny("llama")).merge_and_unload()
    prompt = {"input_ids": X, "attention_mask": torch.ones_like(X), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**prompt), merged.generate(**prompt))
    status = get_model_status(model)
    assert (status.peft_types, status.num_adapter_layers) == ({"forget": "ROUTED"}, 2)
    assert status.trainable_params == 2 * 3 * 5 * 16
    assert all(layer.enabled and layer.active_adapters == ["forget"] for layer in get_layer_status(model))


def test_only_the_region_is_trained_and_modes_are_kept():
    base = tiny("gpt2", resid_pdrop=0.1).train()
    model = get_peft_model(base, RoutedConfig(size=3), adapter_name="forget")
    assert all(layer.training and layer.base_layer.training for layer in layers(model))
    idle = get_peft_model(tiny("gpt2"), RoutedConfig(size=3), adapter_name="forget")
    assert not any(layer.training or layer.routed_up["forget"].training for layer in layers(idle))
    model(X, labels=X).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".forget." in name)
    assert not hasattr(layers(model)[0], "weight")  # what others probe for must be absent, not broken


def test_initialisation(tmp_path):
    base = tiny("gpt2", n_embd=64, initializer_range=0.1)
    before = logits(base)
    model = get_peft_model(base, RoutedConfig(size=400), adapter_name="forget")
    assert model.peft_config["forget"].init == "model"  # never loaded from anywhere
    layer = layers(model)[0]
    assert layer.routed_up["forget"].weight.detach().std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.routed_down["forget"].weight.detach().std().item() == pytest.approx(
        0.1 / 2, rel=0.05
    )  # GPT-2: over sqrt(2 * layers)
    assert layer.routed_up["forget"].bias.abs().max() == 0
    assert not torch.equal(logits(model), before)
    model.unload().save_pretrained(tmp_path)

    pretrained = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = get_peft_model(pretrained, RoutedConfig(size=400), adapter_name="forget")
    assert model.peft_config["forget"].init == "zero"
    assert torch.equal(logits(model), before)
    assert layers(model)[0].routed_up["forget"].weight.detach().std().item() == pytest.approx(0.1, rel=0.05)
    chosen = get_peft_model(model.unload(), RoutedConfig(size=4, init="model"), adapter_name="forget")
    assert chosen.peft_config["forget"].init == "model" and not torch.equal(logits(chosen), before)


@pytest.mark.parametrize("name", ["default", "base", "ref", "checkpoint-3"])
def test_reserved_names_are_refused(name):
    base = tiny("llama")
    with pytest.raises(ValueError, match=f"a region cannot be called '{name}'"):
        get_peft_model(base, RoutedConfig(size=3), adapter_name=name)
    assert not layers(base)
    model = with_region(base)
    with pytest.raises(ValueError, match=f"a region cannot be called '{name}'"):
        model.add_adapter(name, RoutedConfig(size=3))
    assert list(model.peft_config) == ["forget"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["feed_forward"]}, r"match no module of LlamaForCausalLM. .* \['model.layers.0.mlp', "),
        ({"layers_to_transform": [7]}, "`layers_to_transform` = .7.. match no module"),
        ({"exclude_modules": ["mlp"]}, "match no module"),
        ({"target_modules": ["self_attn"]}, "LlamaAttention .* is not a supported MLP"),
        ({"target_modules": ["mlp", "self_attn"]}, "LlamaAttention .* is not a supported MLP"),
    ],
)
def test_targets_that_cannot_work(fields, message):
    base = tiny("llama")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, RoutedConfig(size=3, **fields), adapter_name="forget")
    assert not layers(base)


@pytest.mark.parametrize(
    ("model_type", "sizes", "message"),
    [
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, "model type 'opt': it has no supported MLP"),
        ("mixtral", {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 2}, "no supported MLP"),
    ],
)
def test_unsupported_architectures(model_type, sizes, message):
    config = AutoConfig.for_model(
        model_type, vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RoutedConfig(size=3), adapter_name="forget")
    with pytest.raises(ValueError, match="mixture-of-experts|match no module"):
        get_peft_model(model, RoutedConfig(size=3, target_modules=["mlp"]), adapter_name="forget")


def test_other_model_types_work_when_their_targets_are_named():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("helium", vocab_size=64, head_dim=8, **sizes))
    with pytest.raises(ValueError, match=r"'helium': pass them, for example \['mlp'\]"):
        get_peft_model(model, RoutedConfig(size=3), adapter_name="forget")
    on = logits(model := with_region(model, target_modules=["mlp"]))
    torch.testing.assert_close(logits(model.merge_and_unload()), on, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["olmo", "olmo3", "smollm3", "granite", "starcoder2", "stablelm"])
def test_model_types_beyond_the_tested_families(model_type):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, **sizes, **tokens, num_key_value_heads=2, initializer_range=0.2)
    base = AutoModelForCausalLM.from_config(config)
    before = logits(base)
    on = logits(model := with_region(base))
    assert not torch.equal(on, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), on, rtol=0, atol=1e-5)
    assert merged.config.intermediate_size == 29


def test_merging_unknown_names_is_refused():
    model = with_region(tiny("llama"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"holds \['forgot'\]; this model has the regions \['forget'\]"):
            merge(adapter_names=["forgot"])
    assert len(layers(model)) == 2


def test_a_merge_that_no_configuration_describes_is_refused():
    base = tiny("llama")
    base.config.intermediate_size = 23
    model = with_region(base)
    on = logits(model)
    with pytest.raises(ValueError, match="intermediate_size = 23: a plain checkpoint cannot describe"):
        model.merge_and_unload()
    assert torch.equal(logits(model), on)


def test_other_adapter_types_do_not_mix():
    model = with_region(tiny("llama"))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("retain", LoraConfig(target_modules=["q_proj"]))
