import pytest
import torch
from families import FAMILIES, TIED, tiny, tokens
from regions_parts import PEFT_NOISE, Int8Linear, add_region, layers, with_region
from transformers import AutoModelForCausalLM

from routed_peft.architectures import find_mlps, mlp_forward, mlp_layout, width

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)
X = tokens()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_round_trips(family, tmp_path):
    base = FAMILIES[family]()
    before = logits(base)
    units_before = [width(getattr(mlp, mlp_layout(mlp).down), "in") for mlp in find_mlps(base).values()]
    model = with_region(base)
    on = logits(model)
    assert (on - before).abs().max() > 0.05
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    model.merge_adapter()
    torch.testing.assert_close(logits(model), on, rtol=0, atol=1e-5)
    with model.disable_adapter():  # unmerges
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), on)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), on)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), on, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), on, rtol=0, atol=1e-5)
    assert all(
        width(getattr(wide, mlp_layout(wide).down), "in") == units + 5
        for wide, units in zip(find_mlps(plain).values(), units_before, strict=True)
    )
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == (family in TIED)


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_gives_the_original_bit_for_bit(family, tmp_path):
    base = FAMILIES[family]()
    before, names = logits(base), {name: p.clone() for name, p in base.state_dict().items()}
    config = base.config.to_dict()
    model = with_region(base)
    model.merge_adapter()  # what is merged must not stay behind
    plain = model.unload()
    assert plain is base and plain.config.to_dict() == config
    assert list(plain.state_dict()) == list(names)
    assert all(torch.equal(p, names[name]) for name, p in plain.state_dict().items())
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_two_regions_of_different_size(family):
    base = FAMILIES[family]()
    before = logits(base)
    model = with_region(base, "bio", 5)
    bio = logits(model)
    add_region(model, "cyber", 3)
    assert torch.equal(logits(model), bio)  # a new region is not active
    model.set_adapter("cyber")
    cyber = logits(model)
    model.base_model.set_adapter(["bio", "cyber"])
    both = logits(model)
    assert (both - bio).abs().max() > 0.05 and (both - cyber).abs().max() > 0.05

    model.merge_adapter(["cyber"])  # one merged, the other beside it
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        model.merge_adapter(["cyber", "bio"])
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    model.merge_adapter()
    kept = model.merge_and_unload(adapter_names=["bio"])  # `cyber`, merged a moment ago, must not come along
    torch.testing.assert_close(logits(kept), bio, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_different_width_are_padded(family, tmp_path):
    model = with_region(FAMILIES[family](), layers_to_transform=[1])
    assert len(layers(model)) == 1
    on = logits(model)
    merged = model.merge_and_unload()
    widths = {width(getattr(mlp, mlp_layout(mlp).down), "in") for mlp in find_mlps(merged).values()}
    assert len(widths) == 1
    torch.testing.assert_close(logits(merged), on, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), on, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "gpt_neo", "phi", "falcon"])
def test_a_region_adds_what_its_equation_says(family):
    model = with_region(FAMILIES[family]())
    layer = layers(model)[0]
    x = torch.randn(2, 3, width(getattr(layer.base_layer, layer.layout.up), "in"))
    up, down = layer.routed_up["forget"], layer.routed_down["forget"]
    act = getattr(layer.base_layer, layer.layout.act)
    hidden = act(layer.routed_gate["forget"](x)) * up(x) if layer.layout.gated else act(up(x))
    expected = mlp_forward(layer.base_layer, layer.layout, x) + down(hidden)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_biases_follow_the_base():
    llama = layers(with_region(tiny("llama", mlp_bias=True)))[0]
    assert llama.routed_gate["forget"].bias is not None and llama.routed_up["forget"].bias is not None
    assert llama.routed_down["forget"].bias is None
    assert layers(with_region(tiny("llama")))[0].routed_up["forget"].bias is None
    assert layers(with_region(tiny("gpt2")))[0].routed_up["forget"].bias is not None
    assert not layers(with_region(tiny("gpt2")))[0].routed_gate


def test_biases_are_merged():
    model = with_region(tiny("llama", mlp_bias=True))
    on = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), on, rtol=0, atol=1e-5)


def test_outlets_at_zero_ablate_the_region():
    base = tiny("gemma2")
    before = logits(base)
    model = with_region(base)
    for layer in layers(model):
        for outlet in layer.region_outlets:
            getattr(layer, outlet)["forget"].register_forward_hook(lambda module, args, out: out * 0.0)
    assert torch.equal(logits(model), before)


def test_module_attributes_follow_a_merge_and_its_undoing():
    model = with_region(tiny("llama"))
    mlp = layers(model)[0].base_layer
    weight = mlp.up_proj.weight
    model.merge_adapter()
    assert (mlp.intermediate_size, mlp.up_proj.out_features, mlp.down_proj.in_features) == (29, 29, 29)
    assert mlp.up_proj.weight is weight and weight.is_contiguous()
    model.unmerge_adapter()
    assert (mlp.intermediate_size, mlp.up_proj.out_features, mlp.down_proj.in_features) == (24, 24, 24)
    assert mlp.up_proj.weight is weight


def test_bfloat16_base_has_a_float32_region():
    model = with_region(tiny("llama", torch.bfloat16))
    layer = layers(model)[0]
    assert layer.routed_up["forget"].weight.dtype == torch.float32
    assert layer.base_layer.up_proj.weight.dtype == torch.bfloat16
    loss = model(X, labels=X).loss
    assert model(X).logits.dtype == torch.bfloat16
    loss.backward()
    assert layer.routed_down["forget"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        on = model(X).logits
    assert (logits(model.merge_and_unload()) - on).abs().max() < 0.1


def test_what_was_merged_stays_merged_when_no_names_are_given():
    model = with_region(tiny("llama"), "bio")
    add_region(model, "cyber", 3)
    model.merge_adapter(["cyber"])
    on = logits(model)  # `cyber` merged, `bio` active
    torch.testing.assert_close(logits(model.merge_and_unload()), on, rtol=0, atol=1e-5)


def test_safe_merge_refuses_what_is_not_finite():
    model = with_region(tiny("llama"))
    with torch.no_grad():
        layers(model)[1].routed_down["forget"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'forget' are not all finite"):
        model.merge_adapter(safe_merge=True)


def test_a_quantized_base_runs_but_does_not_merge():
    base = tiny("llama")
    last = base.model.layers[1].mlp  # the refusal must come before anything is merged into the first
    last.up_proj = Int8Linear(last.up_proj)
    model = with_region(base)
    on = logits(model)
    assert on.isfinite().all() and layers(model)[1].routed_up["forget"].weight.dtype == torch.float32
    with pytest.raises(ValueError, match="`up_proj` of LlamaMLP: it is a Int8Linear with quantized"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Load the base unquantized"):
        model.merge_and_unload()
    assert not any(layer.merged for layer in layers(model))
    assert torch.equal(logits(model), on)
    assert torch.equal(logits(model.unload()), logits(base))
