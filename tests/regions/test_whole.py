"""Regions of several parts: units, low rank, rows of the token table, gains of the norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, TIED, tiny, tokens
from peft import PeftModel, get_peft_model
from reference import by_example, loss_of
from regions_parts import PEFT_NOISE, randomize
from routing_parts import ROUTES, assert_equal_grads, batch_of, group_names
from torch import nn

from routed_peft import GradientRouting, RoutedConfig, ablated, export, load_routed, presets, save_routed
from routed_peft.regions.embeddings import SharedRows

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
X = tokens()
SHAPES: dict[str, dict[str, Any]] = {
    "all": {"size": 4, "r": 2, "embeddings": "full", "norms": True},
    "rank": {"r": 2, "embeddings": 3},
    "tokens": {"size": 4, "embeddings": [3, 9, 5]},
    "norms": {"norms": True},
}
# Norms of these families compute in float32 even in a float64 model.
TOLERANCE = 1e-5


def whole(family: str, name: str = "forget", dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    model = get_peft_model(tiny(family), RoutedConfig(**fields, task_type="CAUSAL_LM"), adapter_name=name).to(dtype)
    randomize(model, name)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=X).logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_off_merged_and_merged_for_good(family, shape):
    off = logits(tiny(family).double())
    model = whole(family, **SHAPES[shape])
    on = logits(model)
    assert not torch.allclose(on, off, atol=0.1)
    with ablated(model, "forget"):
        assert torch.equal(logits(model), off)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    model.merge_adapter()
    assert torch.allclose(logits(model), on, atol=TOLERANCE)
    model.unmerge_adapter()
    assert torch.equal(logits(model), on)
    assert torch.equal(logits(copy.deepcopy(model).unload()), off)
    plain = model.merge_and_unload()
    assert torch.allclose(logits(plain), on, atol=TOLERANCE)
    assert plain.config.tie_word_embeddings == (family in TIED and shape != "rank")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_two_whole_regions_add_up_and_each_merges_alone(family):
    model = whole(family, "bio", **SHAPES["all"])
    model.add_adapter("cyber", RoutedConfig(**SHAPES["rank"], task_type="CAUSAL_LM"))
    randomize(model.double(), "cyber")
    for names in (["bio"], ["cyber"], ["bio", "cyber"], ["cyber", "bio"]):
        model.base_model.set_adapter(names)
        expected = logits(model)
        plain = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        assert torch.allclose(logits(plain), expected, atol=TOLERANCE), names


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma"])
def test_tied_tables_share_a_full_update_which_is_saved_once(family, tmp_path):
    model = whole(family, embeddings="full")
    heads = [module for module in model.modules() if isinstance(module, SharedRows)]
    assert len(heads) == 1 and len([p for n, p in model.named_parameters() if "routed_" in n]) == 1
    on = logits(model.float())
    model.save_pretrained(tmp_path / "run")
    fresh = PeftModel.from_pretrained(tiny(family), tmp_path / "run" / "forget", adapter_name="forget")
    assert torch.equal(logits(fresh.eval()), on)
    assert len([p for n, p in fresh.named_parameters() if "routed_" in n]) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_one_example_at_a_time(family, shape):
    model = whole(family, init="model" if "size" in SHAPES[shape] else None, **SHAPES[shape])
    model.add_adapter("bio", RoutedConfig(r=2, embeddings="full", task_type="CAUSAL_LM"))
    randomize(model.double(), "bio")
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
    for name, p in model.named_parameters():
        p.grad = grads[name]
    assert_equal_grads(model, expected, TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_token_labels_gate_every_part_at_their_positions(family, shape):
    model, batch = whole(family, **SHAPES[shape]), batch_of(2, padded=False)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
    labels = torch.zeros(2, 6, dtype=torch.long)
    labels[:, 3:] = 1  # retain: the region is ablated from position 3 on
    with torch.no_grad(), routing(labels):
        gated = model(**batch).logits
    with torch.no_grad():
        on = model(**batch).logits
    assert torch.equal(gated[:, :3], on[:, :3]) and not torch.allclose(gated[:, 3:], on[:, 3:])
    with routing(labels):
        loss_of(model, batch).backward()
    if "embeddings" in SHAPES[shape] and SHAPES[shape]["embeddings"] == "full":
        rows = next(p for n, p in model.named_parameters() if "routed_rows" in n and p.shape[0] == 64)
        seen = set(batch["input_ids"][:, :3].flatten().tolist())
        if family == "llama":  # of untied tables the input's alone: a head gives every token a gradient
            assert {int(i) for i in rows.grad.abs().sum(1).nonzero()} <= seen
    routing.detach()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_default_sizes_are_a_share_of_the_base(family):
    model = get_peft_model(tiny(family, **({"n_inner": 96} if family == "gpt2" else {"intermediate_size": 96})),
                           RoutedConfig(task_type="CAUSAL_LM"), adapter_name="forget")  # fmt: skip
    config = model.peft_config["forget"]
    assert (config.kind, config.size, config.r, config.embeddings) == ("whole", 16, 16, "full")
    assert not any("mlp" in name for name in config.target_modules)


def test_layers_to_transform_limit_every_part_but_the_table():
    fields = {**SHAPES["all"], "layers_to_transform": [1], "exclude_modules": ["q_proj"]}
    model = whole("llama", **fields)
    names = {name.split(".routed_")[0].split(".lora_")[0] for name, _ in model.named_parameters() if ".forget." in name}
    assert {name for name in names if ".layers.0." in name} == set()
    assert any(name.endswith("embed_tokens") for name in names) and any("layers.1.mlp" in name for name in names)
    assert any("layers.1.input_layernorm" in name for name in names) and not any("q_proj" in name for name in names)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_is_saved_loaded_ablated_and_exported(family, shape, tmp_path):
    off = logits(tiny(family))
    model = whole(family, dtype=torch.float32, **SHAPES[shape])
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
    routing.detach()
    on = logits(model)
    save_routed(model, tmp_path / "run", routes=presets.sgtm("forget"), train_base=True)
    assert torch.equal(logits(load_routed(tmp_path / "run")), off)
    loaded = load_routed(tmp_path / "run", ["forget"])
    assert torch.equal(logits(loaded), on)
    export(tmp_path / "run", tmp_path / "plain", keep=["forget"])
    export(tmp_path / "run", tmp_path / "off")
    assert torch.allclose(logits(load_routed_plain(tmp_path / "plain")), on, atol=TOLERANCE)
    assert torch.equal(logits(load_routed_plain(tmp_path / "off")), off)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_regions_are_exported_at_scales_of_their_own(family, tmp_path):
    model = whole(family, "bio", dtype=torch.float32, **SHAPES["all"])
    model.add_adapter("cyber", RoutedConfig(**SHAPES["tokens"], task_type="CAUSAL_LM"))
    randomize(model, "cyber")
    model.base_model.set_adapter(["bio", "cyber"])
    save_routed(model, tmp_path / "run", routes=presets.gram(["bio", "cyber"]), train_base=True)
    with ablated(model, "bio", scale=0.5), ablated(model, "cyber", scale=0.25):
        expected = logits(model)
    export(tmp_path / "run", tmp_path / "out", keep=["bio", "cyber"], scale={"bio": 0.5, "cyber": 0.25})
    assert torch.allclose(logits(load_routed_plain(tmp_path / "out")), expected, atol=TOLERANCE)
    with pytest.raises(ValueError, match="no region is kept that it could scale"):
        export(tmp_path / "run", tmp_path / "no", keep=["bio"], scale={"cyber": 0.5})


def load_routed_plain(path: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embeddings": "rows"}, '`embeddings` is "full", a rank, or a list of token ids'),
        ({"embeddings": 0}, "`embeddings` is"),
        ({"embeddings": []}, "`embeddings` is"),
        ({"embeddings": [-1]}, "`embeddings` is"),
        ({"kind": "mlp", "size": 4, "r": 2}, "`r` belongs to kind 'lora'"),
        ({"size": 4, "r": 0}, "`r` must be a whole number"),
        ({"norms": 3}, "`norms` is true or false"),
    ],
)
def test_mistakes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(**fields)


def test_tokens_beyond_the_vocabulary_are_refused_before_anything_changes():
    base = tiny("llama")
    with pytest.raises(ValueError, match="`embeddings` has the token 64, but the table has 64 rows"):
        get_peft_model(base, RoutedConfig(size=4, embeddings=[3, 64]), adapter_name="forget")
    assert not [name for name, _ in base.named_parameters() if "routed" in name]
