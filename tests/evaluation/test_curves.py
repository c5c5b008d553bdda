from __future__ import annotations

import math
import random

import pytest
import torch
from relearning_parts import DATA, model, tokenizer

from routed_peft.evaluation.relearning import Attack, log_spaced
from routed_peft.evaluation.relearning.curves import run_curve
from routed_peft.evaluation.relearning.data import training_batches
from routed_peft.evaluation.text_loss import pad


def test_log_spaced_steps_end_where_they_should():
    assert log_spaced(500) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    for last in random.Random(0).sample(range(2000), 20):
        marks = log_spaced(last)
        assert marks == sorted(set(marks)) and marks[0] == 0 and marks[-1] == last


def run(victim, batches, steps, parameters=None, learning_rate=1e-3, **more):
    parameters = list(victim.parameters()) if parameters is None else parameters
    more = {"measure": lambda model: {"forget": 1.0}, **more}
    return list(run_curve(victim, parameters, batches=batches, learning_rate=learning_rate, steps=steps, **more))


def test_a_step_follows_the_mean_over_targets_and_padding_counts_for_nothing():
    """A long row and a short one; their summed loss is divided by the ten targets, not by all 2 x 8 positions."""
    long, short = ([5, 6, 7, 8, 9, 10, 11, 12], [6, 7, 8, 9, 10, 11, 12, 13]), ([20, 21], [21, 22])
    victim, twin = model(torch.float64), model(torch.float64)
    trained, expected = ([p for name, p in own.named_parameters() if "up_proj" in name] for own in (victim, twin))
    seen = []

    def tick(steps):
        seen.extend(parameter.grad.clone() for parameter in trained if steps)

    points = run(victim, [pad([long, short])], [0, 1], parameters=trained, tick=tick)
    sums = [
        torch.nn.functional.cross_entropy(twin(torch.tensor([ids])).logits[0], torch.tensor(targets), reduction="sum")
        for ids, targets in (long, short)
    ]
    (sum(sums) / 10).backward()
    gradients = [parameter.grad for parameter in expected]
    assert 0 < torch.stack([g.norm() for g in gradients]).norm() < 1, "too short to be clipped"
    for own, wanted in zip(seen, gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-8)  # Llama's norms compute in float32
    assert [point.tokens for point in points] == [0, 10]


def test_gradients_are_clipped_to_a_norm_of_one():
    victim, seen = model(), []
    with torch.no_grad():
        victim.lm_head.weight *= 100
    norm = lambda: torch.stack([p.grad.norm() for p in victim.parameters()]).norm()
    batches = training_batches(tokenizer(), [DATA.forget_train], attack=Attack("forget"), seed=0)
    run(victim, batches, [0, 2], tick=lambda n: seen.append(float(norm())) if n else None)
    assert seen == pytest.approx([1.0, 1.0], rel=1e-3)


def test_training_is_in_training_mode_and_tells_its_steps():
    victim, modes, steps = model(), [], []
    hook = victim.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    batches = training_batches(tokenizer(), [DATA.forget_train], attack=Attack("forget"), seed=0)
    points = run(victim, batches, [0, 1, 4], tick=steps.append)
    hook.remove()
    assert modes == [True] * 4 and sum(steps) == 4 and [point.step for point in points] == [0, 1, 4]


def test_after_a_score_that_is_not_finite_nothing_is_trained_or_measured():
    victim, measured = model(), []

    def measure(attacked):
        measured.append(1)
        return {"forget": float("nan") if len(measured) == 2 else 1.0}

    batches = training_batches(tokenizer(), [DATA.forget_train], attack=Attack("forget"), seed=0)
    ticks = []
    points = run(victim, batches, [0, 1, 4], measure=measure, tick=ticks.append)
    assert len(measured) == 2 and points[1].tokens == points[2].tokens and math.isnan(points[2].scores["forget"])
    assert sum(ticks) == 4, "a bar still comes to its end"
