from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES, tiny
from peft import LoraConfig, get_peft_model
from reference import by_example, by_position, loss_of
from subspace_parts import subspace_file, with_subspace
from torch import nn

from routed_peft import ablated, presets
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting

# Their norms (GPT-Neo: its attention) compute in float32 even in a float64 model.
FLOAT32_NORMS = ("gpt_neo", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3")

ROUTES = {
    "forget": Route(weights={"base": 0.0}),
    "retain": Route(ablated=("forget",)),
    "unlabeled": Route(),
    "era": Route(weights={"base": -0.75, "bio": 2.0}),
    "mixed": Route(weights={"forget": 0.25, "base": 0.5}, ablated=("bio",)),
}


def two_regions(family: str, dtype=torch.float64, **overrides) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny(family, **overrides), RoutedConfig(size=5, init="model", task_type="CAUSAL_LM"), adapter_name="forget"
    )
    model.add_adapter("bio", RoutedConfig(size=3, init="model", task_type="CAUSAL_LM"))
    return model.to(dtype)


def batch_of(size: int, length: int = 6, seed: int = 3, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (size, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    if padded:
        labels[0, -2:], mask[0, -2:], ids[0, -2:] = -100, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def group_names(model: nn.Module, routing: GradientRouting) -> dict[str, str]:
    ids = {id(p): group for group in routing.groups for p in routing.parameters(group)}
    return {name: ids[id(p)] for name, p in model.named_parameters() if id(p) in ids}


def assert_equal_grads(model: nn.Module, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() >= expected.keys()
    for name, reference in expected.items():
        assert (grads[name] - reference).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_one_example_at_a_time(family):
    model, batch = two_regions(family), batch_of(5)
    routing = GradientRouting(model, ROUTES, train_base=True)
    groups = group_names(model, routing)
    assert set(groups.values()) == {"base", "forget", "bio"} and all(p.requires_grad for p in model.parameters())
    with routing(list(ROUTES)):
        loss_of(model, batch).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    routing.detach()
    assert all(not p.requires_grad for n, p in model.named_parameters() if "routed_" not in n)
    for p in model.parameters():
        p.requires_grad_(True)
    model.base_model.set_adapter(["forget", "bio"])
    expected = by_example(model, batch, list(ROUTES.values()), groups)
    for name, p in model.named_parameters():
        p.grad = grads[name]
    assert_equal_grads(model, expected, 1e-6 if family in FLOAT32_NORMS else 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_labels_equal_parameters_by_position(family):
    model, batch = two_regions(family), batch_of(3, length=5)
    labels = torch.randint(0, 5, (3, 5), generator=torch.Generator().manual_seed(3))
    labels[0, -2:] = -100
    assert len(labels[labels >= 0].unique()) == 5, "all routes, also those from whose positions a region is absent"
    routing = GradientRouting(model, ROUTES, train_base=True)
    groups = group_names(model, routing)
    with routing(labels):
        loss_of(model, batch).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    weights = {
        group: torch.tensor([r.weight(group) for r in ROUTES.values()], dtype=torch.float64)[labels.clamp(min=0)]
        for group in routing.groups
    }
    routing.detach()
    model.base_model.set_adapter(["forget", "bio"])
    absent = {
        region: torch.tensor([region in route.ablated for route in ROUTES.values()])[labels.clamp(min=0)]
        for region in ("forget", "bio")
    }
    expected = by_position(model, batch, weights, groups, absent)
    for name, p in model.named_parameters():
        p.grad = grads[name]
    assert_equal_grads(model, expected, 1e-6 if family in FLOAT32_NORMS else 1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_token_gate_removes_the_region_at_its_positions_only(family):
    model, batch = two_regions(family), batch_of(2, padded=False)
    routing = GradientRouting(model, ROUTES, train_base=True)
    labels = torch.full((2, 6), 2)
    labels[:, 3:] = 1  # retain: region `forget` ablated from position 3 on
    with torch.no_grad(), routing(labels):
        gated = model(**batch).logits
    with torch.no_grad():
        on = model(**batch).logits
    assert torch.equal(gated[:, :3], on[:, :3])
    assert not torch.allclose(gated[:, 3:], on[:, 3:])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_regions_are_absent_from_the_examples_named(family):
    model, batch = two_regions(family), batch_of(3, padded=False)
    routing = GradientRouting(model, ROUTES, train_base=True)
    rows = torch.tensor([True, False, True])
    with routing.ablated({"forget": rows, "bio": rows & False}):
        mixed = model(**batch)
        assert not mixed.loss.requires_grad
        longer = model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
    with torch.no_grad(), ablated(model, "forget"):
        off = model(**batch).logits
    with torch.no_grad():
        on = model(**batch).logits
    assert torch.allclose(mixed.logits[rows], off[rows], atol=1e-12) and not torch.allclose(on[rows], off[rows])
    assert torch.allclose(mixed.logits[~rows], on[~rows], atol=1e-12) and longer.shape == (3, 8)
    with pytest.raises(ValueError, match=r"has \['bo'\]; the regions are"), routing.ablated({"bo": rows}):
        pass
    with pytest.raises(ValueError, match="cannot be used within"), routing(["forget"] * 3), routing.ablated({}):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_bit_equal_where_nothing_is_ablated(family, dtype):
    model, batch = two_regions(family, torch.float32), batch_of(4)
    model.base_model.set_adapter(["forget", "bio"])
    context = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with context:
        plain = model(**batch).logits
    routing = GradientRouting(model, ROUTES, train_base=True)
    for labels in (["forget", "era", "unlabeled", "forget"], torch.randint(0, 3, (4, 6)) * 3 % 5 % 4):
        labels = torch.where(labels == 1, 0, labels) if isinstance(labels, torch.Tensor) else labels
        with routing(labels), context:
            routed = model(**batch).logits
        assert torch.equal(routed, plain)
    routing.detach()


@pytest.mark.parametrize("train_base", [True, False])
def test_lora_regions_with_a_retain_adapter(train_base):
    model = get_peft_model(
        tiny("llama"), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), adapter_name="retain"
    )
    model.add_adapter("forget", LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    model, batch = model.double(), batch_of(3)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=train_base, base_adapters=["retain"])
    groups = group_names(model, routing)
    assert {g for n, g in groups.items() if ".retain." in n} == {"base"}
    assert any("lora" not in n for n in groups) == train_base
    with routing(["forget", "retain", "unlabeled"]):
        loss_of(model, batch).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    expected_routes = list(presets.sgtm("forget").values())
    routing.detach()
    for name, p in model.named_parameters():
        p.requires_grad_(name in groups)
    model.base_model.set_adapter(["retain", "forget"])
    for name, p in model.named_parameters():
        p.requires_grad_(name in groups)
    expected = by_example(model, batch, expected_routes, groups)
    for n, p in model.named_parameters():
        p.grad = grads[n]
    assert_equal_grads(model, expected, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_nothing(family, reentrant):
    model, batch = two_regions(family), batch_of(5)
    model.train()
    routing = GradientRouting(model, ROUTES, train_base=True)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.base_model.model.enable_input_require_grads()
        model.zero_grad()
        with routing(list(ROUTES)):
            model(**batch).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_gathering_changes_nothing():
    grads = []
    for gather in (True, False):
        model, batch = two_regions("llama"), batch_of(5)
        routing = GradientRouting(model, ROUTES, train_base=True, gather=gather)
        with routing(list(ROUTES)):
            loss_of(model, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-9, atol=1e-12) for n in grads[0])


def test_multipliers():
    model, batch = two_regions("gpt2"), batch_of(3, padded=False)
    routing = GradientRouting(model, ROUTES, train_base=True)
    grads = []
    for labels, weights in (
        (["unlabeled"] * 3, {"base": torch.tensor([0.5, -0.75, 1.0])}),
        (["unlabeled"] * 3, {"base": torch.tensor([0.5, -0.75, 1.0])[:, None].expand(3, 6)}),
        (["mixed", "era", "unlabeled"], {"bio": torch.zeros(3)}),
    ):
        model.zero_grad()
        with routing(labels, weights):
            loss_of(model, batch).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-12)
        assert ".bio." not in name or not grads[2][name].any()
    with (
        pytest.raises(ValueError, match="one number per example or per position"),
        routing(["retain"] * 3, {"base": torch.ones(2)}),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"the groups are \['base', 'forget', 'bio'\]"),
        routing(["retain"], {"x": torch.ones(1)}),
    ):
        pass


def test_activation_edges_scale_what_flows_into_the_out_projection():
    """Base in-projections of the target layer are reversed, its out-projection and the other layer learn as usual."""
    model, batch = two_regions("gpt_neox"), batch_of(2, padded=False)
    names = [n for n, p in model.named_parameters()]
    routing = GradientRouting(model, presets.era(), train_base=True, edges="activations", layers=[1])
    grads = {}
    for label in ("unlabeled", "forget"):
        model.zero_grad()
        with routing([label] * 2):
            loss_of(model, batch).backward()
        grads[label] = {n: p.grad.clone() for n, p in model.named_parameters()}
    reversed_, equal = [], []
    for n in names:
        if torch.allclose(grads["forget"][n], -0.75 * grads["unlabeled"][n], atol=1e-12):
            reversed_.append(n)
        elif torch.equal(grads["forget"][n], grads["unlabeled"][n]):
            equal.append(n)
    assert {n.split("layers.")[1] for n in reversed_} == {
        "1.mlp.base_layer.dense_h_to_4h.weight", "1.mlp.base_layer.dense_h_to_4h.bias"
    }  # fmt: skip
    assert any("1.mlp.base_layer.dense_4h_to_h" in n for n in equal)
    assert any("1.mlp.routed_up.forget" in n for n in equal)
    routing.self_check(batch)


def test_joint_modules_learn_from_everything():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(
        model, presets.sgtm("forget") | {"b": Route()}, train_base=True, joint=["embeddings", "norms", "head"]
    )
    with routing(["forget", "forget"]):
        loss_of(model, batch).backward()
    learned = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any() and "routed_" not in n}
    assert learned and all("embed" in n or "norm" in n or "lm_head" in n for n in learned)
    assert routing.groups == ["base", "joint", "forget", "bio"]


def test_training_without_labels_raises():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, ROUTES, train_base=True)
    with pytest.raises(ValueError, match="has no labels"):
        model(**batch)
    with torch.no_grad():
        model(**batch)
    with routing.off():
        loss_of(model, batch).backward()
    with routing(["forget"] * 2), pytest.raises(ValueError, match="cannot be nested"), routing(["forget"] * 2):
        pass
    with pytest.raises(ValueError, match="has no labels"):
        model(**batch)


def test_offloaded_models_are_refused():
    """accelerate's hooks sit on the instances, where the swapped class would not be asked."""
    model = two_regions("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"'base_model.model.*' has a forward of its own .*without `device_map` offload"
    ):
        GradientRouting(model, ROUTES, train_base=True)


def test_detach_restores_everything():
    model = two_regions("qwen3", torch.float32)
    before = [(n, type(m)) for n, m in model.named_modules()], {n: p.requires_grad for n, p in model.named_parameters()}
    keys, active = list(model.state_dict()), model.active_adapters
    routing = GradientRouting(model, ROUTES, train_base=True)
    assert list(model.state_dict()) == keys and isinstance(model.get_submodule("base_model.model.lm_head"), nn.Linear)
    routing.detach()
    after = [(n, type(m)) for n, m in model.named_modules()], {n: p.requires_grad for n, p in model.named_parameters()}
    assert before == after and model.active_adapters == active
    with pytest.raises(ValueError, match="detached"), routing(["forget"]):
        pass


def test_deepcopy_of_an_attached_model_runs():
    model, batch = two_regions("llama"), batch_of(2)
    GradientRouting(model, ROUTES, train_base=True)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)


def test_self_check_passes_and_reports():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget") | {"b": Route()}, train_base=True)
    received = routing.self_check(batch)
    assert received["forget"] == {"base": False, "forget": True, "bio": True}
    assert received["retain"] == {"base": True, "forget": False, "bio": True}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("options", [{"joint": ["norms"]}, {"edges": "activations"}])
def test_self_check_leaves_no_gradient_behind(options):
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.era() | {"b": Route()}, train_base=True, **options)
    routing.self_check(batch)
    assert all(p.grad is None for p in model.parameters())


def test_self_check_finds_a_weight_read_from_outside():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)

    def fused(model, inputs):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        return (hidden @ model.base_model.model.lm_head.weight.t()).pow(2).mean()

    with pytest.raises(ValueError, match="must not train 'base'.*read outside"):
        routing.self_check(batch, fused)


def test_self_check_finds_a_dead_region():
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
    for name, p in model.named_parameters():
        if ".forget." in name:
            p.data.zero_()
    with pytest.raises(ValueError, match="should train 'forget', but no gradient arrived"):
        routing.self_check(batch)


def test_learning_counts_positions():
    model = two_regions("llama", torch.float32)
    routing = GradientRouting(model, ROUTES, train_base=True, joint=["norms"])
    reached = torch.tensor([[True, True, False], [True, False, False]])
    assert routing.count_learning_positions(["forget", "retain"], reached) == {
        "base": 1,
        "joint": 3,
        "forget": 2,
        "bio": 3,
    }


def refuse(message: str, model: nn.Module, routes=None, **options):
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        GradientRouting(model, routes or presets.sgtm("forget"), **options)
    if "attached" not in message:
        assert classes == [type(m) for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]


def lora(name: str = "forget", **options) -> nn.Module:
    return get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["up_proj"], **options), adapter_name=name)


def test_refusals():
    refuse("cannot be called 'default'", lora("default"), train_base=True)
    refuse("no region", lora("retain"), base_adapters=["retain"])
    refuse("`base_adapters` has 'retian'", lora(), base_adapters=["retian"])
    refuse("names 'bio'", lora(), presets.sgtm("bio"), train_base=True)
    refuse("DoRA", lora(use_dora=True), train_base=True)
    refuse("modules_to_save", lora(modules_to_save=["lm_head"]), train_base=True)
    refuse("retain' blocks everything", lora())
    refuse("matches no module", lora(), train_base=True, joint=["embedings"])
    refuse("matches no module", lora(), train_base=True, layers=[2])
    refuse("`edges` is", lora(), train_base=True, edges="activation")
    routes = {"a": Route(), "b": Route(ablated=("forget",))}
    refuse("no route trains the region 'forget'", lora(), {"b": routes["b"]}, train_base=True)

    model = lora()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    refuse("model.norm.weight is trainable, but it belongs to no adapter", model, routes | {"b": Route()})

    model = lora()
    model.base_model.model.to(torch.bfloat16)
    refuse("torch.bfloat16 and trained", model, train_base=True)

    model = lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    refuse("forward of its own", model, train_base=True)

    model = lora()
    model.base_model.model.model.extra = nn.Parameter(torch.zeros(3))
    refuse("cannot be routed", model, train_base=True)

    model = get_peft_model(tiny("qwen3"), RoutedConfig(size=2), adapter_name="forget")
    refuse("shares a weight", model, train_base=True, joint=["embeddings"])
    GradientRouting(model, presets.sgtm("forget"), train_base=True, joint=["embeddings", "head"])
    refuse("is attached to this model already", model, train_base=True)

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["embed_tokens"]), adapter_name="forget")
    refuse("cannot be routed", model, train_base=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT, which goes on
@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_lora_on_a_head_tied_to_the_embeddings_is_refused(family, tmp_path):
    head = LoraConfig(r=2, target_modules=["lm_head"])

    def on_the_head(name: str, **options) -> nn.Module:
        return get_peft_model(tiny(family, **options), head, adapter_name=name)

    message = "'base_model.model.lm_head' shares its weight with the embeddings"
    refuse(message, on_the_head("forget"), train_base=True)
    model = on_the_head("retain")
    model.add_adapter("forget", LoraConfig(r=2, target_modules=["up_proj"]))
    refuse(message, model, base_adapters=["retain"])
    GradientRouting(on_the_head("forget", tie_word_embeddings=False), presets.sgtm("forget"), train_base=True)
    mlp = get_peft_model(tiny(family), RoutedConfig(size=2), adapter_name="forget")
    GradientRouting(mlp, presets.sgtm("forget"), train_base=True)
    subspace = with_subspace(tiny(family), subspace_file(tmp_path), "forget")  # guards the embeddings
    GradientRouting(subspace, presets.sgtm("forget"), train_base=True)


class NoisyNorm(nn.LayerNorm):
    dropout = 0.0

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__(size)
        self.dropout = dropout

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self.dropout, self.training)


def test_modules_evaluated_twice_may_not_drop_out():
    for dropout in (0.0, 0.1):
        model = lora()
        model.base_model.model.model.norm = NoisyNorm(16, dropout)
        if dropout:
            refuse("is evaluated twice to be routed, and its dropout would differ", model, train_base=True)
        GradientRouting(model, presets.sgtm("forget"), train_base=True, joint=["norms"] if dropout else []).detach()


def test_refusals_of_wrapped_merged_and_quantized_models():
    with pytest.raises(ValueError, match="DataParallel shares one step's labels"):
        GradientRouting(nn.DataParallel(lora()), presets.sgtm("forget"), train_base=True)
    model = lora()
    model.merge_adapter()
    refuse("adapters are merged into", model, train_base=True)
    model = lora()
    model.base_model.model.is_quantized = True
    refuse("on a quantized model", model, train_base=True)
    refuse("blocks everything", model)  # a frozen one needs `base_adapters`, no more


def test_an_adapter_added_afterwards_raises():
    model = two_regions("llama")
    routing = GradientRouting(model, ROUTES, train_base=True)
    routing.detach()
    model = two_regions("llama")
    routing = GradientRouting(model, ROUTES, train_base=True)
    model.add_adapter("late", RoutedConfig(size=2))
    with pytest.raises(ValueError, match="the adapters were"), routing(["forget"]):
        pass


def test_save_pretrained_of_a_trained_base_raises(tmp_path):
    model = two_regions("llama")
    GradientRouting(model, ROUTES, train_base=True).detach()
    with pytest.raises(ValueError, match="save_routed"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["forget", "retian"], "no route for the label 'retian'"),
        (torch.tensor([0, 7]), "got values from 0 to 7"),
        (torch.tensor([0.0, 1.0]), "integers of shape"),
        (["forget"], "do not line up"),
        (torch.zeros(2, 5, dtype=torch.long), "do not line up"),
    ],
)
def test_bad_labels(labels, message):
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, ROUTES, train_base=True)
    with pytest.raises(ValueError, match=message), routing(labels):
        model(**batch)


def test_heads_first_norms_with_as_many_heads_as_positions():
    model = two_regions("gemma3_text")  # four heads
    routing = GradientRouting(model, ROUTES, train_base=True)
    batch = batch_of(2, length=4)
    with pytest.raises(ValueError, match="as many heads as positions"), routing(torch.zeros(2, 4, dtype=torch.long)):
        model(**batch)
    with routing(["forget", "era"]):
        loss_of(model, batch).backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
def test_compiled_equals_eager():
    grads = []
    for compiled in (False, True):
        model, batch = two_regions("llama", torch.float32), batch_of(5)
        routing = GradientRouting(model, ROUTES, train_base=True, gather=False)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for labels in (list(ROUTES), list(ROUTES)[::-1]):
            with routing(labels):
                loss_of(run, batch).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-5) for n in grads[0])
