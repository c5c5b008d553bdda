"""The grid of an attack: at which of its ends the best rate lies, and how far it grows."""

from __future__ import annotations

import pytest
from relearning_parts import DATA, model, tokenizer

from routed_peft.evaluation.relearning import Curve, Point, RelearnOptions, relearn
from routed_peft.evaluation.relearning.curves import next_rate, open_ends
from routed_peft.evaluation.relearning.sweep import _Sweep

STEPS = [0, 1, 2]


def curve(rate: float, *losses: float, seed: int = 0) -> Curve:
    points = tuple(Point(step, step, {"forget": loss}) for step, loss in zip(STEPS, losses, strict=True))
    return Curve("forget", "forget", rate, seed, {"forget": 5.0}, points)


@pytest.mark.parametrize(
    ("curves", "ends"),
    [
        ([(5.0, 4.0, 3.0), (5.0, 4.5, 4.0), (5.0, 4.8, 4.6)], [-1]),
        ([(5.0, 4.8, 4.6), (5.0, 4.5, 4.0), (5.0, 4.0, 3.0)], [1]),
        ([(5.0, 4.8, 4.6), (5.0, 4.0, 3.0), (5.0, 4.5, 4.0)], []),
        ([(5.0, 4.8, 3.0), (5.0, 4.5, 4.0), (5.0, 4.0, 6.0)], [-1, 1]),  # high rates are faster, low ones get further
        ([(5.0, 4.0, 4.6), (5.0, 4.5, 3.0), (5.0, 4.8, 4.5)], [-1]),  # of the first step alone
        ([(5.0, 6.0, 6.0), (5.0, 7.0, 7.0), (5.0, 8.0, 8.0)], [-1]),  # nothing helps: all may be too large
    ],
)
def test_the_grid_is_open_where_an_end_is_best_at_some_step(curves, ends):
    found = {(rate, 0): curve(rate, *losses) for rate, losses in zip((1e-3, 1e-2, 1e-1), curves, strict=True)}
    assert open_ends(found, [0], STEPS) == ends


def test_the_best_rate_is_that_of_the_mean_over_seeds():
    """The high rate is best for the first seed, and bad for the other."""
    losses = {
        (1e-3, 0): (5.0, 4.5, 4.0),
        (1e-3, 1): (5.0, 4.5, 4.0),
        (1e-2, 0): (5.0, 4.4, 3.0),
        (1e-2, 1): (5.0, 6.0, 7.0),
    }
    found = {(rate, seed): curve(rate, *own, seed=seed) for (rate, seed), own in losses.items()}
    assert open_ends(found, [0, 1], STEPS) == [-1]


def test_a_single_rate_grows_threefold_on_either_side():
    assert next_rate([1e-3], 1) == 3e-3 and next_rate([3e-3], -1) == 1e-3
    assert next_rate([1e-3, 1e-2, 2e-2], -1) == 1e-4 and next_rate([1e-3, 1e-2, 2e-2], 1) == 4e-2


@pytest.mark.parametrize(
    ("losses", "rates"),
    [
        (lambda rate: (4.0 + rate, 4.0 + rate), [2.5e-4, 5e-4, 1e-3, 2e-3]),  # the lower, the better
        (lambda rate: (4.0 - rate, 4.0 - rate), [1e-3, 2e-3, 4e-3, 8e-3]),
        # high rates are faster, low ones get further
        (lambda rate: (4.0 - rate, 3.0 + rate), [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
    ],
)
def test_each_end_grows_by_the_extensions_asked_for(monkeypatch, losses, rates):
    def run(self, cells, tick):
        for rate, seed in cells:
            yield (rate, seed), curve(rate, 5.0, *losses(rate), seed=seed)

    monkeypatch.setattr(_Sweep, "run", run)
    grid = {"learning_rates": [2e-3, 1e-3], "seeds": (0, 1), "steps": STEPS}
    options = RelearnOptions(extensions=2)
    curves = relearn(model(), tokenizer(), attack="forget", data=DATA, **grid, options=options)
    assert [(c.learning_rate, c.seed) for c in curves] == [(rate, seed) for rate in rates for seed in (0, 1)]
