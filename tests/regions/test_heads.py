"""Heads of attention that belong to a region: on, off, ablated, merged, routed, saved, and beside parts of other kinds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny, tokens
from peft import PeftModel, get_peft_model
from reference import by_example, loss_of
from regions_parts import PEFT_NOISE, Int8Linear, randomize
from routing_parts import ROUTES, assert_equal_grads, batch_of, group_names
from subspace_parts import subspace_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from routed_peft import GradientRouting, RoutedConfig, ablated, export, load_routed, presets, save_routed
from routed_peft.regions import RoutedHeads
from routed_peft.regions.attentions import PROJECTIONS, find_attentions

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
X = tokens()
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": True,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },  # 4 heads with one more of each
    "mistral": {"sliding_window": 4},
    "qwen3": {"attention_bias": True},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
}
WHOLE: dict[str, Any] = {"size": 4, "heads": 1, "r": 2, "embeddings": "full", "norms": True}
# Norms of these families compute in float32 even in a float64 model.
TOLERANCE = 1e-5


def base_of(family: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    return tiny(family, **{**FAMILIES.get(family, {}), **overrides}).to(dtype)


def with_heads(family: str, name: str = "forget", dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    config = RoutedConfig(**{"heads": 1, **fields}, task_type="CAUSAL_LM")
    model = get_peft_model(base_of(family), config, adapter_name=name).to(dtype)
    randomize(model, name)
    return model.eval()


def add(model: PeftModel, name: str, **fields: Any) -> None:
    model.add_adapter(name, RoutedConfig(**fields, task_type="CAUSAL_LM"))
    randomize(model.to(model.dtype), name)


def logits(model: nn.Module, ids: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_off_merged_and_merged_for_good(family, kernel):
    if family == "gemma2" and kernel == "sdpa":
        pytest.skip("sdpa has no softcap")
    plain, model = base_of(family), with_heads(family)
    for part in (plain, model.get_base_model()):
        part.set_attn_implementation(kernel)
    off, on = logits(plain), logits(model)
    assert not torch.allclose(on, off, atol=0.1)
    with ablated(model, "forget"):
        assert torch.equal(logits(model), off)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.merge_adapter()
    assert torch.allclose(logits(model), on, atol=TOLERANCE)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.unmerge_adapter()
    assert torch.equal(logits(model), on)
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in copy.deepcopy(model).unload().named_parameters())
    merged, former = model.merge_and_unload(), plain.config
    assert torch.allclose(logits(merged), on, atol=TOLERANCE)
    ratio = former.num_attention_heads // former.num_key_value_heads
    counts = merged.config.num_attention_heads - former.num_attention_heads, merged.config.num_key_value_heads
    assert counts[1] == former.num_key_value_heads + counts[0] // ratio > former.num_key_value_heads
    assert merged.config.head_dim == find_attentions(plain)["model.layers.0.self_attn"].head_dim


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_region_of_a_larger_models_heads_makes_that_model(family):
    """The reference: of a model with more heads, the last are put into a region of the model that has only the first."""
    kept = (2, 1) if family == "llama" else (4, 2)
    large = base_of(family, head_dim=8, num_attention_heads=2 * kept[0], num_key_value_heads=2 * kept[1])
    base = base_of(family, head_dim=8, num_attention_heads=kept[0], num_key_value_heads=kept[1])
    state = large.state_dict()
    base.load_state_dict({n: state[n][tuple(map(slice, p.shape))] for n, p in base.state_dict().items()})
    model = get_peft_model(base, RoutedConfig(heads=kept[1], task_type="CAUSAL_LM"), adapter_name="forget").double()
    assert not torch.allclose(logits(model), logits(large))
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, RoutedHeads):
                (own,) = (*layer.routed_heads.values(), *layer.routed_out.values())
                for key, p in own.named_parameters():
                    full = state[f"{name}.{key}"]
                    p.copy_(full[:, -p.shape[1] :] if layer.is_output else full[-p.shape[0] :])
    assert torch.allclose(logits(model), logits(large), atol=TOLERANCE)
    assert torch.equal(logits(model.merge_and_unload()), logits(large))


@pytest.mark.parametrize("family", ["qwen3", "gemma", "mistral"])
def test_two_regions_add_up_in_any_order_and_each_merges_alone(family):
    model = with_heads(family, "bio", heads=2)
    add(model, "cyber", heads=1)
    for names in (["bio"], ["cyber"], ["bio", "cyber"], ["cyber", "bio"]):
        model.base_model.set_adapter(names)
        expected = logits(model)
        plain = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        assert torch.allclose(logits(plain), expected, atol=TOLERANCE), names
    model.merge_adapter(["cyber"])
    assert torch.allclose(logits(model), expected, atol=TOLERANCE)
    with pytest.raises(ValueError, match="are merged into it, so first call `unmerge_adapter"):
        model.add_adapter("late", RoutedConfig(heads=1))
    model.unmerge_adapter()
    model.delete_adapter("cyber")
    model.base_model.set_adapter(["bio"])
    assert torch.equal(logits(model), logits(with_heads(family, "bio", heads=2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_one_example_at_a_time(family):
    model = with_heads(family, init="model")
    add(model, "bio", heads=2)
    batch = batch_of(5)
    routing = GradientRouting(model, ROUTES, train_base=True)
    groups = group_names(model, routing)
    with routing(list(ROUTES)):
        loss_of(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    routing.detach()
    for p in model.parameters():
        p.requires_grad_(True)
    model.base_model.set_adapter(["forget", "bio"])
    expected = by_example(model, batch, list(ROUTES.values()), groups)
    assert all(g.any() for n, g in expected.items() if "routed_" in n and not n.endswith("bias"))
    for name, p in model.named_parameters():
        p.grad = grads[name]
    assert_equal_grads(model, expected, TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_token_labels_gate_heads_at_their_positions(family):
    model, batch = with_heads(family), batch_of(2, length=9, padded=False)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
    labels = torch.zeros(2, 9, dtype=torch.long)
    labels[:, 3:] = 1  # retain: the region is ablated from position 3 on
    with torch.no_grad(), routing(labels):
        gated = model(**batch).logits
    with torch.no_grad():
        on = model(**batch).logits
    assert torch.equal(gated[:, :3], on[:, :3]) and not torch.allclose(gated[:, 3:], on[:, 3:])
    received = routing.self_check(batch)
    assert received["forget"] == {"base": False, "forget": True}
    assert received["retain"] == {"base": True, "forget": False}
    routing.detach()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = with_heads("qwen3")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        with sdpa_kernel(SDPBackend.MATH):  # when the forward pass is repeated, too
            loss_of(model, batch_of(3)).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_that_without(family, cache):
    model = with_heads(family, dtype=torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(input_ids=X, use_cache=False, **options)
        got = model.generate(input_ids=X, cache_implementation=cache, **options)
        assert torch.equal(got, expected)
        with ablated(model, "forget"):
            off = model.generate(input_ids=X, cache_implementation=cache, **options)
        assert torch.equal(off, base_of(family, torch.float32).generate(input_ids=X, use_cache=False, **options))
        merged = model.merge_and_unload()
        assert torch.equal(merged.generate(input_ids=X, cache_implementation=cache, **options), expected)


@pytest.mark.parametrize("fields", [{}, WHOLE])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_run_is_saved_loaded_ablated_and_exported(family, fields, tmp_path):
    off = logits(base_of(family, torch.float32))
    model = with_heads(family, dtype=torch.float32, **fields)
    GradientRouting(model, presets.sgtm("forget"), train_base=True).detach()
    on = logits(model)
    save_routed(model, tmp_path / "run", routes=presets.sgtm("forget"), train_base=True)
    assert torch.equal(logits(load_routed(tmp_path / "run")), off)
    assert torch.equal(logits(load_routed(tmp_path / "run", ["forget"])), on)
    export(tmp_path / "run", tmp_path / "plain", keep=["forget"])
    export(tmp_path / "run", tmp_path / "off")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(logits(exported), on, atol=TOLERANCE)
    assert exported.config.num_key_value_heads > base_of(family).config.num_key_value_heads
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "off").eval()), off)


def test_a_frozen_base_loads_one_region_of_two(tmp_path):
    base_of("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, RoutedConfig(**WHOLE, task_type="CAUSAL_LM"), adapter_name="bio").eval()
    randomize(model, "bio")
    add(model, "cyber", heads=2)
    save_routed(model, tmp_path / "run")
    for name in ("bio", "cyber"):
        model.base_model.set_adapter([name])
        assert torch.equal(logits(load_routed(tmp_path / "run", [name])), logits(model))
        export(tmp_path / "run", tmp_path / name, keep=[name])


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_whole_region_with_heads(family):
    off = logits(base_of(family))
    model = with_heads(family, **WHOLE)
    assert model.peft_config["forget"].kind == "whole"
    on = logits(model)
    with ablated(model, "forget"):
        assert torch.equal(logits(model), off)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    with pytest.raises(ValueError, match=r"heads cannot be merged while the projection inside \(LowRankLinear\)"):
        model.merge_adapter()
    assert torch.equal(logits(model), on)
    assert torch.equal(logits(copy.deepcopy(model).unload()), off)
    assert torch.allclose(logits(model.merge_and_unload()), on, atol=TOLERANCE)


@pytest.mark.parametrize("order", ["heads first", "lora first"])
def test_a_lora_on_the_same_projections_in_either_order(order, tmp_path):
    parts = {"bio": {"heads": 1}, "cyber": {"r": 2, "target_modules": list(PROJECTIONS)}}
    first, second = parts if order == "heads first" else reversed(parts)
    model = with_heads("qwen3", first, **{"heads": None, **parts[first]})
    add(model, second, **parts[second])
    for names in (["bio"], ["cyber"], ["bio", "cyber"]):
        model.base_model.set_adapter(names)
        plain = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        assert torch.allclose(logits(plain), logits(model), atol=TOLERANCE), names
    model.merge_adapter(["cyber"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="heads cannot be merged while"):
        model.merge_adapter(["bio"])
    on = logits(model.float())
    model.save_pretrained(tmp_path)
    fresh = base_of("qwen3", torch.float32)
    fresh = PeftModel.from_pretrained(fresh, tmp_path / second, adapter_name=second)
    fresh.load_adapter(str(tmp_path / first), first)
    fresh.base_model.set_adapter(["bio", "cyber"])
    assert torch.equal(logits(fresh.eval()), on)


def test_heads_in_some_layers_are_padded_with_zero_ones():
    off = logits(base_of("qwen3"))
    model = with_heads("qwen3", layers_to_transform=[1])
    on = logits(model)
    assert sum(isinstance(module, RoutedHeads) for module in model.modules()) == 4 and not torch.equal(on, off)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), on, atol=TOLERANCE)
    assert not merged.get_submodule("model.layers.0.self_attn.q_proj").weight[-16:].any()


def test_numbers_that_a_configuration_refuses_are_padded_with_a_warning(tmp_path):
    model = get_peft_model(tiny("llama"), RoutedConfig(heads=1, task_type="CAUSAL_LM"), adapter_name="forget").eval()
    randomize(model, "forget")
    on = logits(model)
    with pytest.warns(UserWarning, match="LlamaConfig accepts no 6 attention heads: the merged model has 8"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), on, atol=TOLERANCE)


def test_where_no_number_is_accepted_a_merge_is_refused_and_the_model_stays_whole():
    model = get_peft_model(tiny("llama"), RoutedConfig(heads=7, task_type="CAUSAL_LM"), adapter_name="forget").eval()
    on = logits(model)
    with pytest.raises(ValueError, match="LlamaConfig accepts no number of attention heads from 18 on"):
        model.merge_and_unload()
    assert torch.equal(logits(model), on)


def test_initializations():
    off = logits(base_of("qwen3"))
    for init in ("zero", "model", None):
        config = RoutedConfig(heads=1, init=init, task_type="CAUSAL_LM")
        model = get_peft_model(base_of("qwen3"), config, adapter_name="forget").double().eval()
        assert torch.equal(logits(model), off) == (init == "zero")
        assert model.peft_config["forget"].init == (init or "model")
        values = {n: p for n, p in model.named_parameters() if "routed_heads" in n and not n.endswith("bias")}
        assert all(0.1 < p.std() < 0.3 for p in values.values())  # `initializer_range` is .2


def test_heads_do_not_learn_along_a_subspace(tmp_path):
    model = with_heads("qwen3")
    add(model, "persona", kind="subspace", subspace=subspace_file(tmp_path))
    model.base_model.set_adapter(["forget", "persona"])
    loss_of(model, batch_of(2)).backward()
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    u, gradient = layer.base_layer.routed_U["persona"], layer.routed_out["forget"].weight.grad
    assert gradient.any() and (u.T @ gradient).abs().max() < 1e-9 * gradient.abs().max()


def test_a_quantized_base_gets_heads_but_does_not_merge():
    base = tiny("qwen3")
    for attention in find_attentions(base).values():
        attention.q_proj = Int8Linear(attention.q_proj)
    off = logits(base)
    model = get_peft_model(base, RoutedConfig(heads=1, task_type="CAUSAL_LM"), adapter_name="forget").eval()
    randomize(model, "forget")
    on = logits(model)
    assert not torch.equal(on, off)
    with pytest.raises(ValueError, match="heads cannot be merged into Int8Linear"):
        model.merge_and_unload()
    assert torch.equal(logits(model), on) and torch.equal(logits(model.unload()), off)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", r"in GPT2LMHeadModel 'transformer.h.0.attn' \(GPT2Attention\) has \['c_attn', .*: leave `heads` out"),
        ("gpt_neox", r"'gpt_neox.layers.0.attention' \(GPTNeoXAttention\) has \['query_key_value', 'dense'\]"),
        ("falcon", r"\(FalconAttention\) has \['query_key_value'"),
        ("phi3", r"\(Phi3Attention\) has \['o_proj', 'qkv_proj'\]"),
        ("phi", r"\(PhiAttention\) has"),
        ("gpt_neo", r"\(GPTNeoAttention\) has"),
        ("olmo2", r"'model.layers.0.self_attn' \(Olmo2Attention\) .*`q_norm.weight` belongs to all heads together"),
        ("qwen2", "Qwen2Config has no `head_dim`.*: leave `heads` out, and adapt attention by `r`"),
    ],
)
def test_families_that_cannot_have_more_heads(family, message):
    base = tiny(family)
    names = [name for name, _ in base.named_modules()]
    for fields in ({}, {"size": 4, "r": 2}):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, RoutedConfig(heads=1, **fields, task_type="CAUSAL_LM"), adapter_name="forget")
    assert names == [name for name, _ in base.named_modules()]


def _cases() -> dict[str, tuple[Any, str]]:
    def gate(base: Any) -> None:
        base.model.layers[1].self_attn.gate_proj = nn.Linear(16, 32)

    def count(base: Any) -> None:
        base.model.layers[1].self_attn.num_heads = 4

    def fused(base: Any) -> None:
        base.model.layers[1].self_attn = nn.Identity()

    def wide(base: Any) -> None:
        base.model.layers[1].self_attn.q_proj = nn.Linear(16, 64)

    def sinks(base: Any) -> None:
        base.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(8))

    def listed(base: Any) -> None:
        base.config.__dict__["num_attention_heads"] = [4, 4]

    return {
        "gate": (gate, "`gate_proj.weight` belongs to all heads together"),
        "count": (count, "it computes with a `num_heads` of its own"),
        "fused": (fused, "Qwen3ForCausalLM has 2 layers and 1 attentions with their own"),
        "wide": (wide, r"its projections have the widths \[64, 16, 16, 32\] for 4 heads"),
        "sinks": (sinks, "`sinks` belongs to all heads together"),
        "listed": (listed, r"its configuration has `num_attention_heads` = \[4, 4\]"),
    }


@pytest.mark.parametrize("case", _cases())
def test_attentions_with_more_to_them(case):
    base = tiny("qwen3")
    change, message = _cases()[case]
    change(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, RoutedConfig(heads=1, task_type="CAUSAL_LM"), adapter_name="forget")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"'model.layers.0.self_attn.q_proj' is chosen without \['k_proj', 'v_proj', "),
        ({"target_modules": ["up_proj"]}, "'model.layers.0.mlp.up_proj' is chosen without"),
        ({"exclude_modules": ["o_proj"]}, r"chosen without \['o_proj'\]: leave `target_modules` and `exclude_modules`"),
        ({"heads": 0}, "`heads` must be a whole number of key-value heads"),
        ({"init": "random"}, "`init` must be one of"),
        ({"kind": "lora", "r": 2}, "`heads` belongs to kind 'heads'"),
    ],
)
def test_mistakes_are_refused(fields, message):
    base = tiny("qwen3")
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, RoutedConfig(**{"heads": 1, **fields}), adapter_name="forget")
    assert not [name for name, _ in base.named_parameters() if "routed" in name]
