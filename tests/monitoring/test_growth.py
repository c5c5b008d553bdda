"""What the monitor measures, against slow references in float64."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from monitor_parts import KINDS, ROUTES, model_of, monitored, rows
from transformers import TrainerCallback


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


@pytest.mark.slow
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
