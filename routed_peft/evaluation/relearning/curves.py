"""`Curve`: the losses of one attack at one learning rate and seed, its status, and its records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from routed_peft.evaluation.measures.robustness import TOLERANCE
from routed_peft.evaluation.relearning.data import Batch
from routed_peft.evaluation.text_loss import token_losses
from routed_peft.routes import IGNORED

Measure = Callable[[nn.Module], Mapping[str, float]]
DIVERGED = 1.0
"""An attack counts as diverged if its loss ends so many nats above the start."""
BOUNDS = ("_low", "_high")
"""Endings of the names of scores that bound another score: its confidence interval over documents."""


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: optimizer steps made.
        tokens: targets trained on so far.
        scores: by name: ``forget`` and ``retain`` in nats per token, and the `BOUNDS` of the attack's target, ``forget_low``
            and ``forget_high``; NaN after a score or gradient that was not finite.
    """

    step: int
    tokens: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """One attack at one learning rate and seed.

    Attributes:
        attack: its name.
        target: the score that the attacker wants to lower.
        learning_rate: constant; 0 where nothing is trained.
        seed: of the choice and order of documents, and of all random draws.
        start: scores of the original model; perturbing and rounding come before step 0.
        points: in the order of steps.

    >>> curve = Curve("forget", "forget", 1e-3, 0, {"forget": 5.0}, (Point(0, 0, {"forget": 5.0}),))
    >>> curve.status
    'no attack'
    """

    attack: str
    target: str
    learning_rate: float
    seed: int
    start: Mapping[str, float]
    points: tuple[Point, ...]

    @property
    def status(self) -> str:
        """The result of the attack: ``"attack"``, ``"no attack"`` or ``"diverged"``.

        "attack": the loss fell below its start by `TOLERANCE`. "no attack": it never did. "diverged": the loss is not
        finite; or all scores end more than `DIVERGED` nats above their start; or they were there on the way, and the loss
        never fell. Text that is merely forgotten while other text is learned is no divergence. Only "attack" says something
        about robustness.
        """
        losses = self.losses(self.target)
        lowered = min(losses) < self.start[self.target] - TOLERANCE
        if not all(map(math.isfinite, losses)):
            return "diverged"
        far = [
            all(point.scores.get(name, math.nan) > start + DIVERGED for name, start in self.start.items())
            for point in self.points
        ]
        if far[-1] or (any(far) and not lowered):
            return "diverged"
        return "attack" if lowered else "no attack"

    def losses(self, split: str) -> list[float]:
        """Return one score at every step."""
        return [point.scores.get(split, math.nan) for point in self.points]

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the curve as the points of a `RunDirectory`."""
        for point in self.points:
            about = {"attack": self.attack, "learning_rate": self.learning_rate, "seed": self.seed}
            yield about | {"step": point.step, "tokens": point.tokens, **point.scores}


def run_curve(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    *,
    batches: Iterable[Batch],
    learning_rate: float,
    steps: Sequence[int],
    measure: Measure,
    tick: Callable[[int], Any] = lambda steps: None,
) -> Iterator[Point]:
    """Train ``parameters`` of ``model``, in place, by AdamW at a constant rate, and measure at the given steps.

    No weight decay; the gradient's norm is clipped to 1 (UNDO's attack, arXiv 2506.06278). Training ends early at a score
    or gradient that is not finite. ``batches`` come from `training_batches`; ``steps`` ascend, 0 is before the first
    step, and the last one ends the attack. ``tick`` is called with the number of steps since its last call.
    """
    stream, device = iter(batches), next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0) if parameters else None
    done, tokens, finite = 0, 0, True
    scores: Mapping[str, float] = {}
    for step in steps:
        model.train()
        left = step - done
        for _ in range(left if finite and optimizer is not None else 0):
            ids, mask, targets = (tensor.to(device) for tensor in next(stream))
            count = int((targets != IGNORED).sum())
            assert optimizer is not None
            optimizer.zero_grad()
            (token_losses(model, ids, attention_mask=mask, targets=targets).sum() / count).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            tokens += count
            if not (finite := bool(norm.isfinite())):
                break
            optimizer.step()
            tick(1)
            left -= 1
        scores = measure(model) if finite else {name: math.nan for name in scores}
        finite = finite and all(map(math.isfinite, scores.values()))
        tick(left)
        done = step
        yield Point(step, tokens, dict(scores))


def log_spaced(last: int) -> list[int]:
    """Return steps at which to measure an attack of ``last`` steps: 0, then 1, 2, 5, 10, 20, 50, ...

    >>> log_spaced(40)
    [0, 1, 2, 5, 10, 20, 40]
    """
    marks = (digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5))
    return [0, *(mark for mark in marks if mark < last), *([last] if last else [])]
