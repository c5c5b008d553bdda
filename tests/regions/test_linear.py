"""``kind="lora"``: stock LoRA in all but its type, and regions of several kinds in one model."""

import pytest
import torch
from families import FAMILIES, tiny, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from regions_parts import PEFT_NOISE, randomize
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft import GradientRouting, Route, RoutedConfig, ablate, ablated, export, load_routed, presets, save_routed
from routed_peft.architectures import find_mlps, mlp_layout, width
from routed_peft.checkpoint.stock_lora import to_stock_lora
from routed_peft.regions import LowRankLinear, RoutedMLP

pytestmark = [
    pytest.mark.filterwarnings(PEFT_NOISE),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # stock PEFT on GPT-2
]
X = tokens()
ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).logits


def units(model: nn.Module) -> list[int]:
    return [width(getattr(mlp, mlp_layout(mlp).down), "in") for mlp in find_mlps(model).values()]


def seeded(base: nn.Module, config: object, name: str = "retain") -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base, config, adapter_name=name)


def lora(**fields) -> RoutedConfig:
    return RoutedConfig(kind="lora", r=3, lora_alpha=5, **{**ALL, **fields})


def mixed(family: str = "llama") -> PeftModel:
    """A LoRA on everything that is linear, inside the MLPs that a region of units widens."""
    model = seeded(FAMILIES[family](), RoutedConfig(size=5, init="model", task_type="CAUSAL_LM"), "forget")
    model.add_adapter("retain", lora())
    randomize(model, "forget")
    randomize(model, "retain")
    model.base_model.set_adapter(["forget", "retain"])
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_a_stock_lora_bit_for_bit(family, tmp_path):
    ours = seeded(FAMILIES[family](), lora())
    stock = seeded(FAMILIES[family](), LoraConfig(r=3, lora_alpha=5, **ALL))
    for model in (ours, stock):
        parameters = [(n, p) for n, p in model.named_parameters() if ".retain." in n]
        assert all(p.requires_grad for _, p in parameters)
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".retain." not in n)
    same = dict(stock.named_parameters())
    assert all(torch.equal(p, same[n]) for n, p in ours.named_parameters())  # the same seed, the same start
    randomize(ours, "retain")
    randomize(stock, "retain")
    on = logits(ours)
    assert torch.equal(on, logits(stock))

    for model in (ours, stock):
        model(X, labels=X).loss.backward()
    assert all(torch.equal(p.grad, same[n].grad) for n, p in ours.named_parameters() if p.requires_grad)

    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    a, b = (load_file(tmp_path / who / "retain" / "adapter_model.safetensors") for who in ("ours", "stock"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    read = PeftModel.from_pretrained(FAMILIES[family](), to_stock_lora(tmp_path / "ours" / "retain", tmp_path / "lora"))
    assert read.peft_config["default"].peft_type == "LORA" and torch.equal(logits(read), on)
    config = ours.peft_config["retain"].to_lora()  # without writing anything
    assert torch.equal(
        logits(PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "ours" / "retain", config=config)), on
    )
    one, two = ours.merge_and_unload(), stock.merge_and_unload()
    assert all(torch.equal(p, two.state_dict()[n]) for n, p in one.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pefts_own_doors(family, tmp_path):
    base = FAMILIES[family]()
    before = logits(base)
    model = seeded(base, lora(target_modules=None), "bio")  # PEFT's own default targets
    assert torch.equal(logits(model), before)
    randomize(model, "bio")
    bio = logits(model)
    model.add_adapter("cyber", lora())
    randomize(model, "cyber")
    assert torch.equal(logits(model), bio)
    model.base_model.set_adapter(["bio", "cyber"])
    both = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    with ablated(model, "cyber"):
        assert torch.equal(logits(model), bio)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "bio", adapter_name="bio", low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "cyber", adapter_name="cyber")
    loaded.base_model.set_adapter(["bio", "cyber"])
    assert torch.equal(logits(loaded), both)
    model.delete_adapter("cyber")
    assert torch.equal(logits(model), bio)
    assert torch.equal(logits(model.unload()), before)


def test_a_base_in_bfloat16_has_a_region_in_float32():
    model = seeded(tiny("llama", torch.bfloat16), lora())
    randomize(model, "retain")
    assert {p.dtype for n, p in model.named_parameters() if ".retain." in n} == {torch.float32}
    on = logits(model)
    assert on.dtype == torch.bfloat16
    stock = seeded(tiny("llama", torch.bfloat16), LoraConfig(r=3, lora_alpha=5, **ALL))
    randomize(stock, "retain")
    assert torch.equal(logits(stock), on)
    assert torch.equal(logits(model.merge_and_unload()), logits(stock.merge_and_unload()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_units_and_lora_in_one_model(family, tmp_path):
    base = FAMILIES[family]()
    before = logits(base)
    model = mixed(family)
    inside = [n for n, m in model.named_modules() if isinstance(m, LowRankLinear) and ".mlp.base_layer." in n]
    assert inside and any(isinstance(m, RoutedMLP) for m in model.modules())
    both = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with ablated(model, "forget"):
        retain = logits(model)
    with ablated(model, "retain"):
        forget = logits(model)
    alone = seeded(FAMILIES[family](), lora())
    randomize(alone, "retain")
    assert torch.equal(logits(alone), retain)  # the LoRA does not know of the units

    model.save_pretrained(tmp_path)
    for order in (["forget", "retain"], ["retain", "forget"]):
        read = PeftModel.from_pretrained(FAMILIES[family](), tmp_path / order[0], adapter_name=order[0])
        read.load_adapter(tmp_path / order[1], adapter_name=order[1])
        read.base_model.set_adapter(order)
        torch.testing.assert_close(logits(read), both, rtol=0, atol=1e-6)
    stock = PeftModel.from_pretrained(FAMILIES[family](), to_stock_lora(tmp_path / "retain", tmp_path / "lora"))
    assert torch.equal(logits(stock), retain)

    with pytest.raises(ValueError, match="inside the MLP hold regions of another kind"):
        model.merge_adapter()
    assert torch.equal(logits(model), both)
    merged = mixed(family).merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=0, atol=1e-5)
    assert type(merged) is type(base) and not any(isinstance(m, LowRankLinear) for m in merged.modules())
    kept = mixed(family).merge_and_unload(adapter_names=["retain"])
    torch.testing.assert_close(logits(kept), retain, rtol=0, atol=1e-5)
    kept = mixed(family).merge_and_unload(adapter_names=["forget"])
    torch.testing.assert_close(logits(kept), forget, rtol=0, atol=1e-5)
    assert units(kept) == [n + 5 for n in units(FAMILIES[family]())]
    assert torch.equal(logits(model.unload()), before)


def test_both_kinds_are_routed_trained_saved_and_exported(tmp_path):
    model = mixed().train()
    routes = {"forget": Route(weights={"base": 0.0}), "retain": Route(ablated=("forget",)), "unlabeled": Route()}
    assert routes == presets.sgtm("forget")
    routing = GradientRouting(model, routes, base_adapters=["retain"])
    received = routing.self_check({"input_ids": X, "labels": X})
    assert received == {
        "forget": {"base": False, "forget": True},
        "retain": {"base": True, "forget": False},
        "unlabeled": {"base": True, "forget": True},
    }
    optimizer = torch.optim.SGD([*routing.parameters("base"), *routing.parameters("forget")], lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with routing(["forget", "retain"]):
        model(X, labels=X).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(".forget." in n for n in moved) and any(".retain." in n for n in moved)
    assert all(".forget." in n or ".retain." in n for n in moved)
    routing.detach()
    on = logits(model)
    with ablated(model, "forget"):
        off = logits(model)
    save_routed(model, tmp_path / "run")
    assert torch.equal(logits(load_routed(tmp_path / "run", ["forget"])), on)
    assert torch.equal(logits(load_routed(tmp_path / "run")), off)
    plain = AutoModelForCausalLM.from_pretrained(ablate(tmp_path / "run", tmp_path / "plain"))
    torch.testing.assert_close(logits(plain), off, rtol=0, atol=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "whole", keep=["forget"]))
    torch.testing.assert_close(logits(whole), on, rtol=0, atol=1e-5)
    assert whole.config.intermediate_size == 29


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "`r` must be a whole number of ranks"),
        ({"lora_alpha": "much"}, "`lora_alpha` must be a number"),
        ({"size": 4}, "`size` belongs to kind 'mlp'"),
        ({"init": "zero"}, "`init` belongs to kind 'mlp'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(**{"kind": "lora", **fields})


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["embed_tokens"], "'model.embed_tokens', a Embedding"),
        ("llama", ["mlp"], "goes to linear layers .* a LlamaMLP"),
        ("qwen3", ["lm_head"], "shares its weight with the embeddings"),
        ("llama", ["query"], "match no module"),
    ],
)
def test_targets_that_cannot_work(family, targets, message):
    base = tiny(family)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, RoutedConfig(kind="lora", target_modules=targets), adapter_name="forget")
    assert not any(isinstance(m, LowRankLinear) for m in base.modules())


def test_model_types_without_a_default_need_targets():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "helium", vocab_size=64, head_dim=8, hidden_size=16, intermediate_size=24, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="no default `target_modules` for the model type 'helium'"):
        get_peft_model(model, RoutedConfig(kind="lora"), adapter_name="forget")


def test_a_quantized_layer_runs_but_does_not_merge():
    model = seeded(tiny("llama"), lora(target_modules=["q_proj"]))
    randomize(model, "retain")
    layer = next(m for m in model.modules() if isinstance(m, LowRankLinear))
    layer.base_layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="whose weights are quantized or wrapped"):
        model.merge_adapter()


def test_stock_folders_are_written_from_lora_regions_only(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only a region of kind 'lora' can become a stock LoRA, got kind 'mlp'"):
        to_stock_lora(tmp_path / "forget", tmp_path / "out")
    with pytest.raises(ValueError, match="`out` .* is not an empty directory"):
        to_stock_lora(tmp_path / "retain", tmp_path)
    assert not (tmp_path / "out").exists()
