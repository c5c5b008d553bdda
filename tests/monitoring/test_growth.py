"""What the monitor measures, against slow references in float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from families import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from monitor_parts import KINDS, model_of, monitored, quiet, rows
from reference import loss_of
from subspace_parts import subspace_file, subspace_layers, with_subspace
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from routed_peft import GradientRouting, Route, ablated
from routed_peft.monitoring.alarms import Alarms, Cusum
from routed_peft.monitoring.config import MonitorConfig
from routed_peft.monitoring.factors import find_factors
from routed_peft.monitoring.gradients import EnvironmentGradients
from routed_peft.monitoring.probe import Probe
from routed_peft.monitoring.subspace_energy import weight_drift
from routed_peft.subspaces import Subspace, haar

ROUTES = {
    "all": Route(),
    "less": Route(weights={"forget": -0.5}),
    "base only": Route(weights={"forget": 0.0}),
    "without": Route(ablated=("forget",)),
}
ENVIRONMENTS = {"a": torch.tensor([0, 2, 3]), "b": torch.tensor([1, 4])}


def randomize(model):
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edges", ["parameters", "activations"])
@pytest.mark.parametrize("labels", ["example", "token"])
def test_gradients_by_environment_equal_separate_backward_passes(kind, edges, labels):
    model = model_of(kind, torch.float64)
    randomize(model)
    ids = tokens(5, 6)
    batch = {"input_ids": ids, "labels": ids}
    given = torch.tensor([0, 1, 2, 3, 0])
    if labels == "token":
        given = torch.randint(0, 4, ids.shape, generator=torch.Generator().manual_seed(0))
    routing = GradientRouting(model, ROUTES, train_base=True, edges=edges)
    modules = [module for f in find_factors(model, "forget") for module in f.modules]
    gradients = EnvironmentGradients(modules)
    gradients.start()
    gradients.expect_batch(ENVIRONMENTS, 5)
    with routing(given):
        loss_of(model, batch).backward()
    gradients.stop()
    for name, index in ENVIRONMENTS.items():
        model.zero_grad()
        with routing(given[index]):
            (loss_of(model, {"input_ids": ids[index], "labels": ids[index]}) * len(index) / 5).backward()
        for module in modules:
            assert torch.allclose(gradients.sums[module][name], module.weight.grad, rtol=1e-9, atol=1e-14)
            assert module.weight.grad.abs().max() > 1e-8


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant):
    sums = []
    for checkpointing in (False, True):
        model = model_of("mlp", torch.float64).train()
        randomize(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        modules = [module for f in find_factors(model, "forget") for module in f.modules]
        gradients = EnvironmentGradients(modules)
        gradients.start()
        gradients.expect_batch(ENVIRONMENTS, 5)
        ids = tokens(5, 6)
        with sdpa_kernel(SDPBackend.MATH):  # when it is computed again, too
            loss_of(model, {"input_ids": ids, "labels": ids}).backward()
        sums.append([gradients.sums[module][name] for module in modules for name in ENVIRONMENTS])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-15) for a, b in zip(*sums, strict=True))


def test_rows_that_are_no_rows_are_refused():
    linear = torch.nn.Linear(2, 2)
    gradients = EnvironmentGradients([linear])
    gradients.start()
    gradients.expect_batch(ENVIRONMENTS, 5)
    with pytest.raises(ValueError, match="sees 30 rows where the batch has 5"):
        linear(torch.ones(30, 2))


class Reference(TrainerCallback):
    """The growth of every step and its parts, from dense products and the optimizer's own state."""

    def __init__(self, monitor, trainer):
        self.monitor, self.trainer, self.checked = monitor, trainer, 0
        self.factors = monitor.factors["forget"]

    def products(self):
        return [f.scale * (f.b.weight @ f.a.weight).detach() for f in self.factors]

    def on_pre_optimizer_step(self, *_, **__):
        self.before = self.products()
        self.weights = {m: m.weight.detach().clone() for f in self.factors for m in f.modules}
        self.used = {m: m.weight.grad.clone() for f in self.factors for m in f.modules}

    def on_optimizer_step(self, *_, **__):
        growth, after = self.monitor._growth["forget"], self.products()
        norm = lambda products: torch.cat([d.flatten() for d in products]).norm()
        old, new = norm(self.before), norm(after)
        assert growth.size == pytest.approx(float(new), rel=1e-12)
        assert growth.growth == pytest.approx(float(new - old), rel=1e-9, abs=1e-13)
        attributed = rest = 0.0
        for f, d, d_ in zip(self.factors, self.before, after, strict=True):
            a, b = ((self.weights[m] + m.weight.detach()) / 2 for m in (f.a, f.b))
            for module, v in ((f.a, f.scale * b.T @ (d + d_)), (f.b, f.scale * (d + d_) @ a.T)):
                group = next(
                    g for g in self.trainer.optimizer.param_groups if any(p is module.weight for p in g["params"])
                )
                state, (b1, b2) = self.trainer.optimizer.state[module.weight], group["betas"]
                step, lr = float(state["step"]), group["lr"]
                rate = lr / ((state["exp_avg_sq"] / (1 - b2**step)).sqrt() + group["eps"])
                first = state["exp_avg"] / (1 - b1**step)
                attributed -= (v * rate * self.used[module]).sum()
                rest -= (v * rate * (first - self.used[module])).sum()
                rest -= lr * group["weight_decay"] * (v * self.weights[module]).sum()
        assert float(growth.contributions.sum()) == pytest.approx(float(attributed / (old + new)), rel=1e-9, abs=1e-14)
        assert growth.rest == pytest.approx(float(rest / (old + new)), rel=1e-7, abs=1e-13)
        assert float(growth.contributions.sum()) + growth.rest == pytest.approx(float(new - old), rel=1e-9, abs=1e-13)
        assert growth.captured == pytest.approx(1.0, abs=1e-9)
        self.checked += 1


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_remainder_add_up_to_the_growth(tmp_path, kind):
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=4, max_grad_norm=0.1, max_steps=4)
    trainer, monitor = monitored(tmp_path, model=model_of(kind, torch.float64), clip_per_group=True, **options)
    reference = Reference(monitor, trainer)
    trainer.add_callback(reference)
    trainer.train()
    assert reference.checked == 4
    logged = [line for line in trainer.state.log_history if "monitor/forget/growth" in line]
    assert len(logged) == 4
    for line in logged:
        parts = sum(line[f"monitor/forget/{name}"] for name in ("contribution/noise", "contribution/pattern", "rest"))
        assert parts == pytest.approx(line["monitor/forget/growth"], rel=1e-9, abs=1e-13)


def test_sgd_has_no_diagonal_and_no_remainder(tmp_path):
    trainer, monitor = monitored(
        tmp_path, model=model_of(dtype=torch.float64), optim="sgd", weight_decay=0.0, learning_rate=0.5
    )
    trainer.train()
    growth = monitor.reports["forget"].growth
    assert abs(growth.rest) < 1e-9 * abs(growth.growth) and growth.growth != 0


def test_a_region_at_rest_does_not_grow(tmp_path):
    data = Dataset.from_list(
        [{**row, "route_label": "all" if i >= 8 else "base only"} for i, row in enumerate(rows(16))]
    )
    options = dict(routes=ROUTES, train_base=True, max_steps=1, train_sampling_strategy="sequential")
    _, monitor = monitored(tmp_path, dataset=data, **options)
    monitor.trainer.train()
    growth = monitor.reports["forget"].growth
    assert growth.growth == 0 and growth.size == 0 and not growth.contributions.any() and not growth.raw.any()


def test_probe_against_the_definitions():
    model = model_of("lora", torch.float32)
    randomize(model)
    ids = tokens(4, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    predicts[:, 1:5] = True
    predicts[1, 3:] = False
    rows_ = {"a": torch.tensor([0, 2]), "b": torch.tensor([1, 3])}
    probe = Probe(3)
    probe.keep({"input_ids": ids, "attention_mask": mask}, predicts, rows=rows_, environments=["a", "b", "c"])
    assert probe.kept[0].environment.tolist() == [0, 1, 0]  # by turns
    factors = find_factors(model, "forget")
    effect = probe.measure(model, {"forget": factors}, environments=3, reduce=lambda t: t)["forget"]
    for name, index in (("a", [0, 2]), ("b", [1])):
        outputs, kl, count = [], 0.0, 0
        for row in index:
            real = int(mask[row].sum())
            for with_region in (True, False):
                with torch.no_grad(), nullcontext() if with_region else ablated(model, "forget"):
                    logits = model(input_ids=ids[row : row + 1, :real]).logits[0]
                outputs.append(logits.log_softmax(-1))
            full, without = outputs[-2:]
            at = predicts[row, :real]
            kl += float((full[at].exp() * (full[at] - without[at])).sum())
            count += int(at.sum())
        column = "abc".index(name)
        assert float(effect.kl[column]) == pytest.approx(kl / count, rel=1e-3)
        assert not probe.kept and effect.kl[2].isnan() and effect.overall[2].isnan()
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, key=key: seen.__setitem__(key, output))
        for i, f in enumerate(factors)
        for key, module in (((i, "region"), f.b), ((i, "layer"), f.layer))
    ]
    with torch.no_grad():
        model(input_ids=ids[1:2, :4])
    for handle in handles:
        handle.remove()
    squares = [(factors[i].scale * seen[i, "region"]).square().sum() for i in range(len(factors))]
    totals = [seen[i, "layer"].square().sum() for i in range(len(factors))]
    sizes = torch.stack([(s / t).sqrt() for s, t in zip(squares, totals, strict=True)])
    assert torch.allclose(effect.functional_size[:, 1], sizes, rtol=1e-4)
    assert float(effect.overall[1]) == pytest.approx(float((sum(squares) / sum(totals)).sqrt()), rel=1e-4)


def test_a_subspace_region(tmp_path):
    """Parts of the growth, energy share and drift along the subspace, all by their definitions."""
    model = with_subspace(tiny("llama", torch.float64, vocab_size=300), subspace_file(tmp_path), "forget")
    options = dict(max_steps=1, train_base=True, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer, monitor = monitored(tmp_path, quiet(random_subspaces=2), model=model, **options)
    layers = [f.layer for f in monitor.factors["forget"]]
    assert all(f.b is None for f in monitor.factors["forget"])
    gradients, batches = [], []
    for layer in layers:  # as the monitor does, but kept whole
        layer.register_forward_hook(
            lambda _, __, y: y.register_hook(gradients.append) and None if y.requires_grad else None
        )
    observe = monitor.observe
    monitor.observe = lambda inputs, names: (batches.append(names), observe(inputs, names))
    before = [layer.get_delta_weight("forget").clone() for layer in layers]
    trainer.train()
    report, u = monitor.reports["forget"], layers[0].basis("forget")
    norm = lambda products: float(torch.cat([d.flatten() for d in products]).norm())
    after = [layer.get_delta_weight("forget") for layer in layers]
    assert (
        report.growth.growth == pytest.approx(norm(after) - norm(before), rel=1e-9)
        and report.growth.captured > 1 - 1e-9
    )
    assert sum(report.contributions.values()) + report.growth.rest == pytest.approx(report.growth.growth, rel=1e-9)
    count = len(layers)
    for name in ("noise", "pattern"):
        parts = [
            torch.cat(
                [g[[i for i, other in enumerate(names) if other == name]] for g in gradients[count * k :][:count]]
            )
            for k, names in enumerate(batches)
        ]
        every = torch.cat(parts)
        share = float((every @ u).square().sum() / every.square().sum())
        assert report.extra["energy"][name] == pytest.approx(share, rel=1e-5)
        random = [
            float((every @ haar(Subspace(u), s).at(0).double()).square().sum() / every.square().sum()) for s in (0, 1)
        ]
        assert report.extra["energy_random"][name] == pytest.approx(sum(random) / 2, rel=1e-5)
    assert report.weight_drift < 1e-12
    with torch.no_grad():
        layers[0].base_layer.weight += 0.1 * u[:, :1]
    moved = 0.1 * layers[0].in_features ** 0.5
    kept = torch.cat([m.routed_C0["forget"].flatten() for m in subspace_layers(model)]).norm()
    assert weight_drift(model, "forget") == pytest.approx(moved / float(kept), rel=1e-6)


values = st.lists(st.floats(-100, 100), min_size=5, max_size=60)


@given(values, st.floats(0, 2), st.floats(1, 8))
@settings(deadline=None)
def test_cusum_is_the_largest_sum_of_any_last_values(series, slack, threshold):
    cusum = Cusum(4, slack, threshold)
    for x in series[:4]:
        cusum.update(x)
        assert cusum.level == 0
    assert cusum.mean == pytest.approx(sum(series[:4]) / 4, abs=1e-9)
    z = []
    for x in series[4:]:
        cusum.update(x)
        z.append(min((x - cusum.mean) / cusum.spread - slack, threshold))
        assert cusum.level == pytest.approx(max(0.0, *(sum(z[i:]) for i in range(len(z)))), rel=1e-6, abs=1e-6)
    assert cusum.spread >= torch.tensor(series[:4], dtype=torch.float64).std().item() * (1 - 1e-9)


@given(st.lists(st.floats(-3, 0.5), max_size=40), st.lists(st.floats(2.0, 50), min_size=8, max_size=20))
@settings(deadline=None)
def test_a_shift_is_found_soon_and_its_onset_exactly(quiet_values, shifted):
    """Values within the slack of the calibrated mean raise nothing; from the first beyond it on, each counts at least one."""
    alarms = Alarms(MonitorConfig(calibration=20, watch=["growth"], patience=1))
    before = [1.0, -1.0] * 10 + quiet_values  # mean 0, standard deviation 1.03
    for step, x in enumerate(before, 1):
        alarms.observe(step, {"forget/growth": x})
        assert alarms.status == "ok"
    for step, x in enumerate(shifted, len(before) + 1):
        alarms.observe(step, {"forget/growth": x})
        assert alarms.onset_step == len(before)
    assert alarms.status == "halt"
    assert alarms.series["forget/growth"].streak >= len(shifted) - 5


def test_one_outlier_is_no_alarm_and_a_broken_value_is():
    alarms = Alarms(MonitorConfig(calibration=4, watch=["growth"], patience=2))
    for step, x in enumerate([1.0, 2.0, 1.0, 2.0, 1e9, 1.5, 1.5], 1):
        alarms.observe(step, {"forget/growth": x})
        assert alarms.status == "ok"
    alarms.observe(8, {"forget/growth": float("nan")})
    assert alarms.status == "warn" and alarms.onset_step == 4
    state = alarms.state()
    again = Alarms(alarms.config)
    again.restore(state)
    assert again.state() == state and again.status == "warn"
