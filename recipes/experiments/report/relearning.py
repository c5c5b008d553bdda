"""Attacks of an experiment, summed up over the cells of one condition."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routed_peft.data import FORGET
from routed_peft.evaluation.measures import (
    Crossing,
    Spread,
    relearning_area,
    removed,
    share_relearned,
    to_recover,
    worst_case,
)
from routed_peft.evaluation.measures.robustness import TOLERANCE
from routed_peft.evaluation.relearning import Attack
from routed_peft.evaluation.relearning.summary import Envelope
from routed_peft.report import attacks
from routed_peft.report.attacks import nan_if_none, spread

Row = Mapping[str, Any]
"""A cell of an experiment."""
LEAST_REMOVED = 0.1
"""Nats that a method must have removed for a share of them to mean anything."""


@dataclass(frozen=True)
class Relearning(attacks.Relearning):
    """One attack on one condition; where seeds differ its verdict is "attack in 2 of 3 seeds, diverged in 1".

    Attributes:
        recovery_by_seed: `recovery` of every seed.
        halfway: steps until the mean over seeds is midway between never-unlearned model and perfect filter, both before any
            attack.
        removed: at each step, with all three models under the same attack.
    """

    recovery_by_seed: tuple[Crossing, ...] = ()
    halfway: Crossing | None = None
    removed: tuple[Spread | None, ...] = ()

    @property
    def in_every_seed(self) -> bool:
        """Whether it was an attack in every seed; else the mean over seeds is higher than what an attacker can reach."""
        return self.verdict == "attack"

    @property
    def recovery_range(self) -> tuple[Crossing, Crossing]:
        """The soonest and the latest seed; one that does not recover is the latest of all."""
        order = sorted(self.recovery_by_seed, key=lambda one: (one.relation == ">", one.at))
        return order[0], order[-1]


@dataclass(frozen=True)
class _Seed:
    """The worst case of one attack on one cell."""

    steps: tuple[int, ...]
    forget: tuple[float, ...]
    retain: float
    useful: float
    verdict: str
    interior: bool
    rates: tuple[float, ...]
    best: float
    before: float


def relearning(
    name: str, cells: Mapping[int, Row], *, base: Mapping[int, Row], oracle: Mapping[int, Row]
) -> Relearning:
    r"""Sum up an attack on the cells of one condition.

    .. math:: L^*(s) = \frac1n \sum_{i=1}^{n}\ \min_{s' \le s}\ \min_{\eta}\ L(s'; \eta, i)

    in nats per token. Every seed i is a model of its own, against which the attacker picks a learning rate :math:`\eta` and
    when to stop; so the grids of seeds may differ, as they do where they extended themselves. (Where one checkpoint is
    attacked with several seeds, `worst_case` averages before it minimises.)

    Args:
        name: of the attack.
        cells: seed -> cell of the condition; those without this attack are left out.
        base: seed -> cell of the model that was never unlearned.
        oracle: seed -> cell of the perfect filter.

    Raises:
        ValueError: where seeds were not measured at the same steps.
    """
    target = Attack.parse(name).target
    found, low, high = ({s: _seed(c, name, target) for s, c in own.items() if name in c.get("attacks", {})}
                        for own in (cells, base, oracle))  # fmt: skip
    grids = {seed.steps for own in (found, low, high) for seed in own.values()}
    if len(grids) > 1:
        raise ValueError(
            f"the attack {name!r} was measured at different steps, {sorted(grids)}: attack all cells alike"
        )
    (steps,) = grids
    if target == FORGET:
        reference, ceiling = (
            {seed: own[seed]["forget_loss"] for seed in found if seed in own} for own in (base, oracle)
        )
    else:  # other text is scored, on which other models were measured under the same attack alone
        reference, ceiling = ({seed: own[seed].forget[0] for seed in found if seed in own} for own in (low, high))
    before = {s: own.before for s, own in found.items()}
    midway = {seed: (loss + ceiling[seed]) / 2 for seed, loss in reference.items() if seed in ceiling}
    ends = [seed for seed in found if seed in low and seed in high]
    return Relearning(
        steps=steps,
        reference=statistics.fmean(reference.values()) if reference else None,
        forget=tuple(Spread.from_values(values) for values in zip(*(seed.forget for seed in found.values()), strict=True)),
        retain=spread([seed.retain for seed in found.values()]),
        useful=spread([seed.useful for seed in found.values()]),
        verdict=_verdict([seed.verdict for seed in found.values()]),
        interior=all(seed.interior for seed in found.values()),
        learning_rates=tuple(sorted({rate for seed in found.values() for rate in seed.rates})),
        best_rates=tuple(sorted({seed.best for seed in found.values()})),
        recovery=_recovery(steps, found, references=reference),
        recovery_by_seed=tuple(to_recover(steps, found[seed].forget, reference=loss) for seed, loss in reference.items()),
        halfway=_recovery(steps, found, references=midway, tolerance=0.0),
        share_relearned=spread(
            share_relearned(before[s], found[s].forget[-1], loss)
            for s, loss in reference.items()
            if before[s] - loss > LEAST_REMOVED
        ),
        area=_area(steps, found, references=reference, high=high),
        removed=tuple(
            spread([removed(found[s].forget[i], low[s].forget[i], high[s].forget[i]) for s in ends])
            for i in range(len(steps))
        ),
    )  # fmt: skip


def _seed(cell: Row, name: str, target: str) -> _Seed:
    curves = sorted(cell["attacks"][name], key=lambda curve: curve["learning_rate"])
    forget = {curve["learning_rate"]: [[nan_if_none(loss) for loss in curve["forget_losses"]]] for curve in curves}
    retain = {curve["learning_rate"]: [[nan_if_none(loss) for loss in curve["retain_losses"]]] for curve in curves}
    rates = tuple(forget)
    steps = curves[0]["steps"][: len(forget[rates[0]][0])]  # what trains nothing is measured once
    # perturbing comes before the first step
    before = cell["forget_loss"] if target == FORGET else worst_case(steps, forget)[0].mean
    found = Envelope.from_losses(
        steps,
        forget,
        retain=retain,
        before=before,
        retain_before=cell["retain_loss"],
        statuses={curve["status"] for curve in curves},
    )
    last = found.states[-1]
    return _Seed(
        steps=tuple(steps),
        forget=tuple(state.case.mean for state in found.states),
        retain=last.retain,
        useful=math.nan if found.useful is None else found.useful[-1].case.mean,
        verdict=found.verdict,
        interior=last.interior,
        rates=rates,
        best=last.case.learning_rate,
        before=before,
    )


def _verdict(seeds: Sequence[str]) -> str:
    """Sum up the verdicts of an attack over seeds.

    >>> _verdict(["attack", "attack"]), _verdict(["diverged", "no attack"]), _verdict(["attack", "diverged"])
    ('attack', 'no attack in 1 of 2 seeds, diverged in 1', 'attack in 1 of 2 seeds, diverged in 1')
    """
    kinds = [kind for kind in ("attack", "no attack", "diverged") if kind in seeds]
    if len(kinds) == 1:
        return kinds[0]
    first, *others = (f"{kind} in {seeds.count(kind)}" for kind in kinds)
    return f"{first} of {len(seeds)} seeds, {', '.join(others)}"


def _recovery(
    steps: Sequence[int], found: Mapping[int, _Seed], *, references: Mapping[int, float], tolerance: float = TOLERANCE
) -> Crossing | None:
    """Return the steps until the mean reaches the mean of ``references``, seed -> loss; None where there are none."""
    if not references:
        return None
    mean = [statistics.fmean(losses) for losses in zip(*(found[seed].forget for seed in references), strict=True)]
    return to_recover(steps, mean, reference=statistics.fmean(references.values()), tolerance=tolerance)


def _area(
    steps: Sequence[int],
    found: Mapping[int, _Seed],
    *,
    references: Mapping[int, float],
    high: Mapping[int, _Seed],
) -> Spread | None:
    if len(steps) < 2:
        return None
    ends = [seed for seed in references if seed in high]
    return spread([relearning_area(steps, found[s].forget, base=references[s], oracle=high[s].forget) for s in ends])
