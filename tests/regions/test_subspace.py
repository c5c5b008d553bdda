"""``kind="subspace"``: ``W + U M``, and a base that cannot learn along ``U``."""

import pytest
import torch
from families import TIED, tiny
from peft import AutoPeftModelForCausalLM, PeftModel, get_model_status
from reference import loss_of
from regions_parts import PEFT_NOISE, randomize
from subspace_parts import FAMILIES, X, by_hand, float64, logits, subspace_file, subspace_layers, with_subspace
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft import RoutedConfig, ablate, ablated, export, load_routed, save_routed
from routed_peft.architectures import find_writers
from routed_peft.checkpoint.stock_lora import to_stock_lora
from routed_peft.regions.linear import LowRankLinear
from routed_peft.regions.subspace import ProtectedEmbedding, project_base
from routed_peft.subspaces import Subspace, leak

pytestmark = [
    pytest.mark.filterwarnings(PEFT_NOISE),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # stock PEFT on GPT-2
]
BATCH = {"input_ids": X, "labels": X}


def plain_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of the base under the names of the plain model."""
    named = model.named_parameters()
    return {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): p.grad for n, p in named if p.grad is not None
    }


def trained(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.requires_grad_(True)
    return model.train()


def residual_first(module: nn.Module) -> torch.Tensor:
    """A writer's or embedding's gradient with the residual stream as its first axis."""
    grad = module.base_layer.weight.grad
    return grad if isinstance(module.base_layer, nn.Linear) else grad.T


@pytest.mark.parametrize("layers", [None, 2], ids=["shared", "by layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_definition(family, layers, tmp_path):
    model = trained(with_subspace(float64(family), subspace_file(tmp_path, layers=layers)))
    writers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    u = {name: layer.routed_U["persona"] for name, layer in writers.items()}
    m = {name: layer.routed_M["persona"].weight.detach().clone().requires_grad_() for name, layer in writers.items()}
    plain = float64(family).train()
    assert list(writers) == list(find_writers(plain)) and len(writers) == 4
    embeddings = [e for e in plain.modules() if isinstance(e, nn.Embedding)]
    with by_hand(plain, u, m, embeddings):
        expected = loss_of(plain, BATCH)
    expected.backward()
    got = loss_of(model, BATCH)
    got.backward()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    gradients = plain_gradients(model)
    for name, p in plain.named_parameters():
        tolerance = 1e-6 if family in ("qwen3", "gemma", "llama", "phi3") else 1e-10  # norms that compute in float32
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=tolerance, msg=name)
    for name, layer in writers.items():
        torch.testing.assert_close(layer.routed_M["persona"].weight.grad, m[name].grad, rtol=0, atol=1e-6)
        assert layer.routed_M["persona"].weight.grad.abs().max() > 1e-4
    for module in subspace_layers(model):
        head_too = family in TIED and getattr(module, "num_embeddings", 0) == 64 and "wpe" not in str(module)
        if not head_too:
            along = module.routed_U["persona"].T @ residual_first(module)
            assert along.abs().max() < 1e-12 < residual_first(module).abs().max()


def test_the_weak_strength_projects_weight_gradients_and_nothing_else(tmp_path):
    path = subspace_file(tmp_path)
    weak = trained(with_subspace(float64("llama"), path, strength="weights"))
    free = trained(with_subspace(float64("llama"), path, strength="weights"))
    for layer in subspace_layers(free):
        layer.strengths.clear()
    values = [loss_of(model, BATCH) for model in (weak, free)]
    assert torch.equal(*values)
    for value in values:
        value.backward()
    u = subspace_layers(weak)[0].routed_U["persona"]
    projected = plain_gradients(weak)
    for name, gradient in plain_gradients(free).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            gradient = gradient - u @ (u.T @ gradient)
        if name.endswith("embed_tokens.weight"):
            gradient = gradient - gradient @ u @ u.T
        torch.testing.assert_close(projected[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_without_gradients_or_with_the_region_off_nothing_is_cut(tmp_path):
    model = trained(with_subspace(float64("llama"), subspace_file(tmp_path)))
    plain = float64("llama").train()
    loss_of(plain, BATCH).backward()
    with model.disable_adapter():
        for p in model.parameters():
            p.requires_grad_(True)
        loss_of(model, BATCH).backward()
    gradients = plain_gradients(model)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert all(layer.protected_basis("cut") is None for layer in subspace_layers(model))
    assert all(layer.protected_basis("cut") is not None for layer in subspace_layers(model))
    with ablated(model, "persona"):  # absent from the forward pass, and still nobody else's to learn
        model.zero_grad()
        loss_of(model, BATCH).backward()
    layer = next(m for m in model.modules() if isinstance(m, LowRankLinear))
    assert (layer.routed_U["persona"].T @ residual_first(layer)).abs().max() < 1e-12
    assert layer.routed_M["persona"].weight.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_own_doors(family, tmp_path):
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before, names = logits(base), list(base.state_dict())
    model = with_subspace(base, subspace_file(tmp_path), start=True)
    assert torch.equal(logits(model), before)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"routed_M"}
    randomize(model, "persona")
    on = logits(model)
    assert (on - before).abs().max() > 0.01
    with ablated(model, "persona"):
        assert torch.equal(logits(model), before)
    assert get_model_status(model).active_adapters == ["persona"]

    model.save_pretrained(tmp_path)
    folder = tmp_path / "persona"
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text().replace(str(tmp_path / "base"), "")
    for file in tmp_path.glob("subspaces/u*.safetensors"):
        file.unlink()  # the region's own files are enough
    fresh = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), folder, adapter_name="persona")), on)
    lean = PeftModel.from_pretrained(fresh(), folder, adapter_name="persona", low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), on)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder, adapter_name="persona")), on)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), on)

    model.add_adapter("other", RoutedConfig(kind="subspace", subspace=subspace_file(tmp_path, k=3, seed=9)))
    randomize(model, "other")
    assert torch.equal(logits(model), on)
    model.base_model.set_adapter(["persona", "other"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.delete_adapter("other")
    assert torch.equal(logits(model), on) and not any("other" in name for name in model.state_dict())
    merged = with_subspace(fresh(), subspace_file(tmp_path)).merge_and_unload()
    torch.testing.assert_close(logits(merged), on, rtol=0, atol=1e-5)
    assert list(merged.state_dict()) == names
    assert torch.equal(logits(model.unload()), before) and list(model.base_model.model.state_dict()) == names


def test_transformers_own_add_adapter(tmp_path):
    model = tiny("llama")
    before = logits(model)
    model.add_adapter(RoutedConfig(kind="subspace", subspace=subspace_file(tmp_path)), adapter_name="persona")
    randomize(model, "persona")
    assert not torch.equal(logits(model), before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)


def test_a_base_in_bfloat16_keeps_its_region_in_float32(tmp_path):
    base = tiny("llama", torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = with_subspace(base, subspace_file(tmp_path))
    own = {n: t.dtype for n, t in model.state_dict().items() if "routed_" in n}
    assert len(own) == 4 * 3 + 2 and set(own.values()) == {torch.float32}
    on = logits(model)
    assert on.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        read = PeftModel.from_pretrained(read, tmp_path / "persona", low_cpu_mem_usage=lean)
        assert torch.equal(logits(read), on)
        assert {t.dtype for n, t in read.state_dict().items() if "routed_" in n} == {torch.float32}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant, tmp_path):
    path = subspace_file(tmp_path)
    plain, checkpointed = (trained(with_subspace(float64("llama"), path)) for _ in range(2))
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(**BATCH).loss.backward()
    expected = plain_gradients(plain)
    assert all(torch.equal(g, expected[n]) for n, g in plain_gradients(checkpointed).items())


def test_two_regions_cut_the_sum_of_their_subspaces(tmp_path):
    model = with_subspace(float64("llama"), subspace_file(tmp_path))
    model.add_adapter("other", RoutedConfig(kind="subspace", subspace=subspace_file(tmp_path, k=3, seed=9)))
    model.base_model.set_adapter(["persona", "other"])
    trained(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, BATCH).backward()
        for layer in subspace_layers(model):
            for u in layer.routed_U.values():
                assert (u.T @ residual_first(layer)).abs().max() < 1e-12
        optimizer.step()
        project_base(model)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            change = module.base_layer.weight - start[f"{name}.base_layer.weight"]
            assert change.abs().max() > 1e-3
            assert all((u.T @ change).abs().max() < 1e-12 for u in module.routed_U.values())


@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("gpt2", {}), ("gpt_neox", {}), ("qwen3", {})])
def test_projection_after_the_step_stops_adams_leak(family, fields, tmp_path):
    """Elementwise division by moments and weight decay leave the complement of U that the gradient is in."""

    def leaks(project: bool) -> list[float]:
        model = trained(with_subspace(float64(family), subspace_file(tmp_path), start=True))
        start = {id(layer): layer.base_layer.weight.detach().clone() for layer in subspace_layers(model)}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            loss_of(model, BATCH).backward()
            optimizer.step()
            if project:
                assert project_base(model) == len(subspace_layers(model))
        result = []
        for layer in subspace_layers(model):
            pair = [layer.base_layer.weight, start[id(layer)]]
            pair = pair if isinstance(layer.base_layer, nn.Linear) else [w.T for w in pair]
            result.append(leak(*pair, layer.routed_U["persona"]))
            bias = getattr(layer.base_layer, "bias", None)
            if bias is not None and project:
                part = layer.routed_C0["persona"][:, -1]
                assert (layer.routed_U["persona"].T @ bias - part).abs().max() < 1e-12
        return result

    assert max(leaks(project=True)) < 1e-15
    assert min(leaks(project=False)) > 1e-4


def test_a_retain_lora_stays_off_the_subspace(tmp_path):
    path = subspace_file(tmp_path)
    model = with_subspace(tiny("llama"), path)
    model.add_adapter("retain", RoutedConfig(kind="lora", r=3, subspace=path, target_modules="all-linear"))
    randomize(model, "retain")
    model.base_model.set_adapter(["persona", "retain"])
    both = logits(model)
    with ablated(model, "persona"):
        retain = logits(model)
    x = torch.randn(2, 3, 24)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with ablated(model, "persona"):
        update = layer(x) - layer.base_layer(x)
    assert update.abs().max() > 0.1 and (update @ layer.routed_U["retain"]).abs().max() < 1e-5
    assert "retain" not in model.base_model.model.model.layers[0].mlp.up_proj.routed_U  # no writer

    save_routed(model, tmp_path / "run", base_adapters=["retain"], train_base=False)
    assert torch.equal(logits(load_routed(tmp_path / "run", ["persona"])), both)
    assert torch.equal(logits(load_routed(tmp_path / "run")), retain)  # on its own, without the region
    plain = AutoModelForCausalLM.from_pretrained(ablate(tmp_path / "run", tmp_path / "plain"))
    torch.testing.assert_close(logits(plain), retain, rtol=0, atol=5e-5)
    whole = AutoModelForCausalLM.from_pretrained(export(tmp_path / "run", tmp_path / "whole", keep=["persona"]))
    torch.testing.assert_close(logits(whole), both, rtol=0, atol=5e-5)
    stock = PeftModel.from_pretrained(tiny("llama"), to_stock_lora(tmp_path / "run" / "retain", tmp_path / "lora"))
    torch.testing.assert_close(logits(stock), retain, rtol=0, atol=5e-5)


def test_units_of_an_mlp_region_do_not_learn_along_the_subspace(tmp_path):
    model = with_subspace(float64("llama"), subspace_file(tmp_path))
    model.add_adapter("forget", RoutedConfig(size=3, init="model"))
    model.base_model.set_adapter(["persona", "forget"])
    trained(model)
    loss_of(model, BATCH).backward()
    mlp = model.base_model.model.model.layers[0].mlp
    u = mlp.base_layer.down_proj.routed_U["persona"]
    gradient = mlp.routed_down["forget"].weight.grad
    assert (u.T @ gradient).abs().max() < 1e-12 < gradient.abs().max()
    on = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), on, rtol=0, atol=1e-10)


def test_a_quantized_base_keeps_no_part_and_does_not_merge(tmp_path):
    base = tiny("llama")
    for writer in find_writers(base).values():
        writer.weight = nn.Parameter(writer.weight.to(torch.int8), requires_grad=False)
    path = subspace_file(tmp_path)
    with pytest.raises(ValueError, match="`store_base_part=True` on a quantized base"):
        with_subspace(base, path, store_base_part=True)
    assert not subspace_layers(base)
    model = with_subspace(base, path)
    assert model.peft_config["persona"].store_base_part is False
    assert not any(len(layer.routed_C0) for layer in subspace_layers(model))
    with pytest.raises(ValueError, match="whose weights are quantized or wrapped"):
        model.merge_adapter()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs `subspace`, the path of a file of directions"),
        ({"subspace": "u", "strength": "strong"}, "`strength` must be one of 'cut', 'weights', got 'strong'"),
        ({"subspace": "u", "size": 3}, "`size` belongs to kind 'mlp'"),
        ({"subspace": "u", "r": 3}, "`r` belongs to kind 'lora'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        RoutedConfig(kind="subspace", **fields)


@pytest.mark.parametrize(
    ("family", "overrides", "file", "fields", "message"),
    [
        ("llama", {}, {"width": 20}, {}, "of width 20, but that of 'model.layers.0.self_attn.o_proj' has 16"),
        ("llama", {}, {"layers": 1}, {}, r"has no basis for layer 1, only for \[0\]"),
        (
            "llama",
            {},
            {},
            {"target_modules": ["q_proj"]},
            "goes to residual writers, .* got 'model.layers.0.self_attn.q_p",
        ),
        ("llama", {}, {}, {"target_modules": ["nothing"]}, "match no module"),
        ("gemma2", {}, {}, {}, r"normalizes what a layer writes before it is added \(`post_feedforward_layernorm`\)"),
        ("olmo2", {}, {}, {}, "not built for such models"),
        (
            "gpt2",
            {"resid_pdrop": 0.1},
            {},
            {},
            r"applies dropout .*'resid_pdrop': 0.1.* load it with `resid_pdrop=0.0`",
        ),
        ("gpt_neox", {"hidden_dropout": 0.1}, {}, {}, "load it with `hidden_dropout=0.0`"),
    ],
)
def test_models_and_files_that_do_not_fit(family, overrides, file, fields, message, tmp_path):
    base = tiny(family, **overrides)
    with pytest.raises(ValueError, match=message):
        with_subspace(base, subspace_file(tmp_path, **file), **fields)
    assert not subspace_layers(base) and not any(isinstance(m, ProtectedEmbedding) for m in base.modules())


def test_a_missing_file_and_a_basis_that_was_never_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no subspace file"):
        with_subspace(tiny("llama"), str(tmp_path / "none.safetensors"))
    model = with_subspace(tiny("llama"), subspace_file(tmp_path))
    model.save_pretrained(tmp_path)
    config = RoutedConfig.from_pretrained(tmp_path / "persona")
    assert config.subspace is None and config.provenance["source"] == "random"
    from peft import get_peft_model

    with pytest.raises(ValueError, match="the basis of the region 'again' was not loaded"):
        logits(get_peft_model(tiny("llama"), RoutedConfig(**config.to_dict() | {"inference_mode": False}), "again"))
    again = with_subspace(
        tiny("llama"), Subspace.load(next(tmp_path.glob("subspaces/u*"))).save(tmp_path / "same.safetensors")
    )
    assert torch.equal(logits(again), logits(model))


def test_a_basis_that_lost_its_precision_is_noticed(tmp_path):
    model = with_subspace(tiny("llama"), subspace_file(tmp_path)).to(torch.bfloat16)
    with pytest.raises(ValueError, match="the basis of the region 'persona' is not orthonormal"):
        logits(model)


def test_a_deleted_region_leaves_nothing_to_a_new_one_of_its_name(tmp_path):
    model = with_subspace(float64("llama"), subspace_file(tmp_path))
    model.add_adapter("other", RoutedConfig(kind="subspace", subspace=subspace_file(tmp_path, k=3, seed=9)))
    model.delete_adapter("other")
    model.add_adapter("other", RoutedConfig(kind="lora", r=2, target_modules=["o_proj"]))
    randomize(model, "other")
    model.base_model.set_adapter(["other"])
    trained(model)
    loss_of(model, BATCH).backward()  # nothing is cut: the new region has no subspace
    layer = next(m for m in model.modules() if isinstance(m, LowRankLinear))
    assert layer.protected_basis("cut") is None and len(layer.routed_C0) == 1
