"""Training with a subspace region: the toy that shows which strength holds, and Trainers that put the base back."""

import pytest
import torch
from datasets import Dataset
from families import VOCABULARY, tiny
from reference import by_example, loss_of
from regions_parts import PEFT_NOISE
from subspace_parts import logits, subspace_file, subspace_layers, with_subspace
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from routed_peft import GradientRouting, Route, RoutedTrainer, RoutedTrainingArguments, ablated, load_routed, presets
from routed_peft.data import RoutedCollator
from routed_peft.regions.linear import LowRankLinear
from routed_peft.regions.subspace import project_base
from routed_peft.subspaces import Subspace, drift, leak
from routed_peft.training import SubspaceProjection

pytestmark = pytest.mark.filterwarnings(PEFT_NOISE)


class Toy:
    """A residual stream that is to learn a "persona" in U and a task in V, both on its last layer's output."""

    def __init__(self, strength: str | None, folder, steps: int = 100, region: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(32, 6, generator=generator)).Q
        self.u, self.v = basis[:, :2], basis[:, 2:]
        self.goal = torch.tensor([3.0, -1.5])
        self.table = torch.randn(VOCABULARY, 4, generator=generator)
        base = tiny("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.1)
        self.base = base.model
        base.model.layers[-1].register_forward_hook(lambda _, args, h: setattr(self, "hidden", h))
        path = str(Subspace(self.u, {"source": "toy"}).save(folder / "toy.safetensors"))
        self.model = with_subspace(base, path, start=True, strength=strength or "cut")
        if strength is None:
            for layer in subspace_layers(self.model):
                layer.strengths.clear()
        self.ids = torch.randint(3, VOCABULARY, (8, 8), generator=generator)
        with torch.no_grad():
            self.before, self.reference = self.losses(self.ids)[0].item(), self.hidden
        self.train(steps, strength is not None, generator, region)
        with torch.no_grad():
            self.on = self.losses(self.ids)[0].item()
            with ablated(self.model, "persona"):
                persona, task = self.losses(self.ids)
            self.off, self.task, self.drift = persona.item(), task.item(), drift(self.hidden, self.reference, self.u)

    def losses(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.base(ids)
        persona = (self.hidden @ self.u - self.goal).square().sum(-1).mean()
        return persona, (self.hidden @ self.v - self.table[ids]).square().mean()

    def train(self, steps: int, project: bool, generator: torch.Generator, region: bool) -> None:
        routing = GradientRouting(self.model, presets.subspace("persona"), train_base=True)
        parameters = [*routing.parameters("base"), *(routing.parameters("persona") if region else ())]
        optimizer = torch.optim.AdamW(parameters, lr=6e-3)
        for _ in range(steps):
            ids = torch.randint(3, VOCABULARY, (8, 8), generator=generator)
            with routing(["all"] * 8):
                sum(self.losses(ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if project:
                project_base(self.model)
        routing.detach()


@pytest.mark.slow
def test_only_the_credit_cut_keeps_the_base_from_learning_the_persona(tmp_path):
    free, weak, cut = (Toy(strength, tmp_path) for strength in (None, "weights", "cut"))
    assert free.before == weak.before == cut.before > 5
    for toy in (free, weak, cut):
        assert toy.on < 0.15 * toy.before and toy.task < 0.5  # all learn the persona, and the task without it
    assert free.off < 0.1 * free.before  # ablating an unrouted region removes nothing
    assert weak.off < 0.25 * weak.before  # other layers learned what the writers could not
    assert cut.off > 0.8 * cut.before  # as if never trained
    assert cut.drift < 0.5 * weak.drift


@pytest.mark.slow
def test_without_a_region_to_take_it_the_weak_strength_learns_the_persona_all_the_same(tmp_path):
    weak, cut = (Toy(strength, tmp_path, region=False) for strength in ("weights", "cut"))
    assert weak.on == weak.off < 0.1 * weak.before and weak.task < 0.5  # through rows that writers had along U
    assert cut.on == cut.off > 0.7 * cut.before and cut.task < 0.5


def rows(count: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (count, 6), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "route_label": ["all"] * count})


def options(cls, out, **more):
    fixed = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 6}
    quiet = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return cls(str(out), **(fixed | quiet | more))


def routed(out, tokenizer, model, resume=None, **more) -> RoutedTrainer:
    args = options(RoutedTrainingArguments, out, train_base=True, **more)
    trainer = RoutedTrainer(
        model, args, routes=presets.subspace("persona"), train_dataset=rows(), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.routing.detach()
    return trainer


def leaks(model, before) -> list[float]:
    return [
        leak(m.base_layer.weight, before[f"{n}.base_layer.weight"], m.routed_U["persona"])
        for n, m in model.named_modules()
        if isinstance(m, LowRankLinear)
    ]


def snapshot(model) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def test_routed_trainer_projects_saves_and_resumes_exactly(tmp_path, tokenizer):
    path = subspace_file(tmp_path)
    model = with_subspace(tiny("llama"), path, start=True)
    before = snapshot(model)
    routed(tmp_path / "a", tokenizer, model, save_strategy="steps", save_steps=3)
    assert max(leaks(model, before)) < 1e-10
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n.endswith((".persona",)))  # U, C0

    again = with_subspace(tiny("llama"), path, start=True)
    routed(tmp_path / "b", tokenizer, again, resume=str(tmp_path / "a" / "checkpoint-3"))
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in again.state_dict().items())

    saved = tmp_path / "a" / "checkpoint-6"
    loaded = load_routed(
        saved, ["persona"], is_trainable=True
    )  # continues from the first base's part, not the trained one's
    parts = [n for n in before if "routed_C0" in n]
    assert len(parts) == 5 and all(torch.equal(loaded.state_dict()[n], before[n]) for n in parts)
    on = logits(model)
    with ablated(model, "persona"):
        off = logits(model)
    assert torch.equal(logits(loaded), on) and not torch.equal(on, off)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), off)


def test_the_callback_serves_any_trainer(tmp_path, tokenizer):
    def trained(*callbacks) -> float:
        model = with_subspace(tiny("llama"), subspace_file(tmp_path), start=True)
        for p in model.parameters():
            p.requires_grad_(True)
        before = snapshot(model)
        collator = RoutedCollator(tokenizer, None)
        args = options(TrainingArguments, tmp_path / "plain")
        Trainer(
            model,
            args,
            train_dataset=rows().remove_columns("route_label"),
            data_collator=collator,
            callbacks=[*callbacks],
        ).train()
        return max(leaks(model, before))

    assert trained(SubspaceProjection()) < 1e-10
    assert trained() > 1e-3


def test_the_callback_refuses_a_model_without_a_subspace(tmp_path, tokenizer):
    args = options(TrainingArguments, tmp_path)
    trainer = Trainer(
        tiny("llama"),
        args,
        train_dataset=rows().remove_columns("route_label"),
        data_collator=RoutedCollator(tokenizer, None),
        callbacks=[SubspaceProjection()],
    )
    with pytest.raises(ValueError, match="for models with a region of kind 'subspace'"):
        trainer.train()


def test_labels_weigh_the_region_too(tmp_path):
    model = with_subspace(tiny("llama"), subspace_file(tmp_path), start=True).train()
    routes = {"all": Route(), "clean": Route(weights={"persona": 0.0}), "anchor": Route(ablated=("persona",))}
    routing = GradientRouting(model, routes, train_base=True)
    ids = torch.randint(3, VOCABULARY, (2, 6))
    assert routing.self_check({"input_ids": ids, "labels": ids}) == {
        "all": {"base": True, "persona": True},
        "clean": {"base": True, "persona": False},
        "anchor": {"base": True, "persona": False},
    }


@pytest.mark.parametrize("strength", ["cut", "weights"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # whose norms compute in float64
def test_labels_and_the_cut_together_equal_one_example_at_a_time(family, strength, tmp_path):
    routes = {
        "all": Route(),
        "flagged": Route(weights={"base": 0.0}),
        "half": Route(weights={"base": 0.5, "persona": -1.0}),
        "anchor": Route(ablated=("persona",)),
    }
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = with_subspace(tiny(family, torch.float64), subspace_file(tmp_path), strength=strength).train()
    routing = GradientRouting(model, routes, train_base=True)
    groups = {name: "persona" if ".persona." in name else "base" for name, _ in model.named_parameters()}
    with routing(list(routes)):
        loss_of(model, batch).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    routing.detach()
    for p in model.parameters():
        p.requires_grad_(True)
    expected = by_example(model, batch, list(routes.values()), groups)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12, msg=name)


def test_autocast_cuts_to_its_own_precision(tmp_path):
    model = with_subspace(tiny("llama"), subspace_file(tmp_path)).train()
    for p in model.parameters():
        p.requires_grad_(True)
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for layer in subspace_layers(model):
        u, weight = layer.routed_U["persona"], layer.base_layer.weight
        gradient = weight.grad if isinstance(layer, LowRankLinear) else weight.grad.T
        assert u.dtype == torch.float32 and (u.T @ gradient).norm() < 1e-2 * gradient.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own tracing
@pytest.mark.parametrize("strength", ["cut", "weights"])
def test_compiled_it_is_one_graph_with_the_same_gradients(strength, tmp_path):
    model = with_subspace(tiny("llama"), subspace_file(tmp_path), strength=strength).train()
    for p in model.parameters():
        p.requires_grad_(True)
    layer = next(module for module in subspace_layers(model) if isinstance(module, LowRankLinear))
    x = torch.randn(2, 3, 16, requires_grad=True)

    def gradients(function) -> list[torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    plain = gradients(layer)
    compiled = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
