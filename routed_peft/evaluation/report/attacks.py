"""What an attack brings back: from curves at every learning rate to a worst case over seeds, compared with other models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routed_peft.data import FORGET
from routed_peft.evaluation.measures import (
    Crossing,
    Spread,
    recovered,
    relearning_area,
    to_recover,
    way,
    worst_case,
)
from routed_peft.evaluation.measures.relearning import TOLERANCE
from routed_peft.evaluation.relearning import Attack
from routed_peft.evaluation.relearning.outcome import Outcome

Row = Mapping[str, Any]
REMOVED = 0.1
"""Nats that a method must have removed for a share of them to mean anything."""


@dataclass(frozen=True)
class Relearning:
    """One attack on one condition, or on one checkpoint.

    Attributes:
        steps: at which losses were taken, ascending from 0.
        forget: lowest forget loss that the attacker has by each step, over seeds.
        retain: retain loss of the model that they then have, at the last step.
        useful: lowest forget loss by the last step among states whose retain loss rose by at most 5 %.
        verdict: "attack"; or "no attack" where no learning rate lowered the loss, "diverged" where all of them diverged; where
            seeds differ, "attack in 2 of 3 seeds, diverged in 1".
        interior: whether the best rate lies inside the grid in every seed, so that none beyond it would do better.
        learning_rates: all that were tried.
        best_rates: the best one by the last step, each once.
        recovery: steps until the never-unlearnt model's forget loss is reached by the mean over seeds; None where that
            loss is not known.
        recovery_by_seed: the same in every seed.
        recovery_tokens: tokens of the attacker until then, where a checkpoint was attacked.
        halfway: steps until the mean over seeds is midway between never-unlearnt model and perfect filter, both before any
            attack; None where these are not known. Reached by weaker attacks than a whole recovery.
        recovered: share of what was removed that the last step has brought back, seed by seed (`recovered`), where that was
            more than `REMOVED`; None likewise.
        reference: loss of the never-unlearnt model before any attack, on the text that is scored; None where not known.
        area: normalised area under the relearning curve (`relearning_area`); None where there is nothing to compare with.
        documents: between which losses it would end with other documents of the same kind, in 95 of 100 bootstrap draws; None
            where that is not known.
        way: at each step, from no routing to perfect filter under the same attack; None likewise.
    """

    steps: tuple[int, ...]
    forget: tuple[Spread, ...]
    retain: Spread | None
    useful: Spread | None
    verdict: str
    interior: bool
    learning_rates: tuple[float, ...]
    best_rates: tuple[float, ...]
    recovery: Crossing | None = None
    recovery_by_seed: tuple[Crossing, ...] = ()
    recovery_tokens: Crossing | None = None
    halfway: Crossing | None = None
    recovered: Spread | None = None
    reference: float | None = None
    area: Spread | None = None
    documents: tuple[float, float] | None = None
    way: tuple[Spread | None, ...] = ()

    @property
    def attacked(self) -> bool:
        """Whether it was an attack at all, in some seed at least; else its numbers say nothing of robustness."""
        return self.verdict.startswith("attack")

    @property
    def whole(self) -> bool:
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


def relearning(name: str, cells: Mapping[int, Row], base: Mapping[int, Row], oracle: Mapping[int, Row]) -> Relearning:
    r"""Sum up an attack on the cells of one condition.

    .. math:: L^*(s) = \frac1n \sum_{i=1}^{n}\ \min_{s' \le s}\ \min_{\eta}\ L(s'; \eta, i)

    in nats per token. Every seed i is a model of its own, against which the attacker picks a learning rate :math:`\eta` and
    when to stop; so the grids of seeds may differ, as they do where they extended themselves. (Where one checkpoint is
    attacked with several seeds, `worst_case` averages before it minimises.)

    Args:
        name: of the attack.
        cells: seed -> cell of the condition; those without this attack are left out.
        base: seed -> cell of the model that was never unlearnt.
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
        forget=tuple(Spread.of(values) for values in zip(*(seed.forget for seed in found.values()), strict=True)),
        retain=spread([seed.retain for seed in found.values()]),
        useful=spread([seed.useful for seed in found.values()]),
        verdict=_verdict([seed.verdict for seed in found.values()]),
        interior=all(seed.interior for seed in found.values()),
        learning_rates=tuple(sorted({rate for seed in found.values() for rate in seed.rates})),
        best_rates=tuple(sorted({seed.best for seed in found.values()})),
        recovery=_recovery(steps, found, reference),
        recovery_by_seed=tuple(to_recover(steps, found[seed].forget, loss) for seed, loss in reference.items()),
        halfway=_recovery(steps, found, midway, tolerance=0.0),
        recovered=spread(
            recovered(before[s], found[s].forget[-1], loss)
            for s, loss in reference.items()
            if before[s] - loss > REMOVED
        ),
        area=_area(steps, found, reference, high),
        way=tuple(
            spread([way(found[s].forget[i], low[s].forget[i], high[s].forget[i]) for s in ends])
            for i in range(len(steps))
        ),
    )  # fmt: skip


def spread(values: Iterable[float]) -> Spread | None:
    """Sum up those values that are numbers; None where there are none.

    >>> spread([1.0, float("nan")]), spread([])
    (Spread(mean=1.0, min=1.0, max=1.0, n=1), None)
    """
    found = [value for value in values if math.isfinite(value)]
    return Spread.of(found) if found else None


def of_summary(result: Mapping[str, Any]) -> Relearning:
    """Return one attack of a summary that ``routed-peft relearn`` wrote, as it was summed up there.

    Args:
        result: what `routed_peft.evaluation.relearning.summarise` returned.
    """
    envelope = result["envelope"]
    count = len({curve["seed"] for curve in result["curves"]})
    recovery = result.get("recovery") or {}
    share, area = recovery.get("share"), result.get("area")
    steps, tokens = (
        found and Crossing(found["at"], found["relation"]) for found in map(recovery.get, ("steps", "tokens"))
    )
    last = envelope[-1]
    low, high = map(_number, last.get("documents") or (None, None))
    useful = result.get("useful", {}).get("envelope")
    return Relearning(
        steps=tuple(entry["step"] for entry in envelope),
        reference=result.get("reference"),
        forget=tuple(_entry(entry, count) for entry in envelope),
        retain=spread([_number(last["retain"])]),
        useful=_entry(useful[-1], count) if useful else None,
        verdict=result["verdict"],
        interior=result["interior"],
        learning_rates=tuple(float(rate) for rate in result["learning_rates"]),
        best_rates=(last["learning_rate"],),
        recovery=steps,
        recovery_tokens=tokens,
        recovered=None if share is None else Spread(share, share, share, count),
        area=None if area is None else Spread(area, area, area, count),
        documents=(low, high) if math.isfinite(low) and math.isfinite(high) else None,
    )


def _seed(cell: Row, name: str, target: str) -> _Seed:
    curves = sorted(cell["attacks"][name], key=lambda curve: curve["learning_rate"])
    forget = {curve["learning_rate"]: [[_number(loss) for loss in curve["forget_losses"]]] for curve in curves}
    retain = {curve["learning_rate"]: [[_number(loss) for loss in curve["retain_losses"]]] for curve in curves}
    rates = tuple(forget)
    steps = curves[0]["steps"][: len(forget[rates[0]][0])]  # what trains nothing is measured once
    # perturbing comes before the first step
    before = cell["forget_loss"] if target == FORGET else worst_case(steps, forget)[0].mean
    found = Outcome.of(steps, forget, retain, before, cell["retain_loss"], {curve["status"] for curve in curves})
    last = found.envelope[-1]
    return _Seed(
        steps=tuple(steps),
        forget=tuple(state.case.mean for state in found.envelope),
        retain=last.retain,
        useful=math.nan if found.useful is None else found.useful[-1].case.mean,
        verdict=found.verdict,
        interior=last.interior,
        rates=rates,
        best=last.case.learning_rate,
        before=before,
    )


def _verdict(seeds: Sequence[str]) -> str:
    """Sum up what became of an attack in every seed.

    >>> _verdict(["attack", "attack"]), _verdict(["diverged", "no attack"]), _verdict(["attack", "diverged"])
    ('attack', 'no attack in 1 of 2 seeds, diverged in 1', 'attack in 1 of 2 seeds, diverged in 1')
    """
    kinds = [kind for kind in ("attack", "no attack", "diverged") if kind in seeds]
    if len(kinds) == 1:
        return kinds[0]
    first, *others = (f"{kind} in {seeds.count(kind)}" for kind in kinds)
    return f"{first} of {len(seeds)} seeds, {', '.join(others)}"


def _recovery(
    steps: Sequence[int], found: Mapping[int, _Seed], references: Mapping[int, float], tolerance: float = TOLERANCE
) -> Crossing | None:
    """Return when the mean over seeds reaches the mean of ``references``, seed -> loss; None where there are none."""
    if not references:
        return None
    mean = [statistics.fmean(losses) for losses in zip(*(found[seed].forget for seed in references), strict=True)]
    return to_recover(steps, mean, statistics.fmean(references.values()), tolerance)


def _area(
    steps: Sequence[int],
    found: Mapping[int, _Seed],
    references: Mapping[int, float],
    high: Mapping[int, _Seed],
) -> Spread | None:
    if len(steps) < 2:
        return None
    ends = [seed for seed in references if seed in high]
    return spread([relearning_area(steps, found[s].forget, references[s], high[s].forget) for s in ends])


def _entry(entry: Mapping[str, Any], count: int) -> Spread:
    return Spread(entry["mean"], entry["min"], entry["max"], count)


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON knows no NaN, and not all writers keep it
