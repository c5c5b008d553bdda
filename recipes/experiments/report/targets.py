"""The targets that were set for an experiment, met or missed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from experiments.report.aggregate import BASE, FILTER, ORACLE, Comparison, Result
from experiments.report.methods import UNDO, card, in_order
from experiments.report.numbers import ranged, signed
from experiments.report.relearning import Relearning
from experiments.report.verdicts import edge, routed_method
from routed_peft.evaluation.measures import Crossing
from routed_peft.report.numbers import number, place, share

REMOVED = {0.5: 0.95, 0.1: 0.9}
"""Share of labels -> least share that the routed model should have removed."""
OF_REMOVAL = ("removed", "filter", "robust", "alpha", "steps")
"""Kinds of targets that say nothing where the base knows no more than the perfect filter, so that nothing can be removed."""
TAX, ON, ROBUST, PLACEBO, STEPS, RMU, FRESH, SEEDS = 0.05, 0.10, 0.95, 0.10, 0.8, 3.0, 0.7, 3


@dataclass(frozen=True)
class Target:
    """A target and its measurement.

    Attributes:
        kind: one word for the goal, such as "removed".
        wanted: the goal in words.
        measured: the numbers.
        met: whether it was reached; None where the numbers cannot tell.
        seeds: number of seeds.
        edge: whether our model was attacked best at the lowest or highest learning rate tried, so that another might do more.
    """

    kind: str
    wanted: str
    measured: str
    met: bool | None
    seeds: int
    edge: bool = False

    @property
    def verdict(self) -> str:
        """Return whether it was met, in words.

        >>> Target("removed", "removed at least 95 %", "98 %", True, 1).verdict
        'met, on 1 seed only'
        >>> Target("robust", "loss above that of the filter", "4.54 ‡ against 3.41", True, 3, edge=True).verdict
        'met ‡'
        """
        if self.met is None:
            return "cannot be told"
        few = f", on {self.seeds} seed{'s' if self.seeds > 1 else ''} only"
        return ("met" if self.met else "missed") + " ‡" * self.edge + few * (self.seeds < SEEDS)


def targets(found: Comparison, shares: Sequence[float] | None = None) -> list[Target]:
    """Compare an experiment with its targets, as far as it has the numbers; of labels that are least wrong.

    Args:
        found: the experiment; where it has routed models in variants alone, the first of these is looked at.
        shares: of labels that are looked at; all by default.
    """
    result: list[Target] = []
    ours = routed_method(found)
    for labeled in filter(None, found.shares if shares is None else shares):  # without labels nothing was routed
        routed = found.get(ours, labeled, found.best_quality)
        if routed is not None:
            result += goals(found, routed, labeled)
    return [*result, *_of_placebos(found), *_if_removable(found, [*_of_steps(found), *_of_undo(found)])]


def _if_removable(found: Comparison, told: Iterable[Target]) -> list[Target]:
    return [one if found.removable or one.kind not in OF_REMOVAL else replace(one, met=None) for one in told]


def goals(found: Comparison, routed: Result, labeled: float) -> list[Target]:
    """Compare a routed model with its targets.

    Args:
        found: the experiment; filters are looked up at the labels that are least wrong.
        routed: the model.
        labeled: share of labels, as in ``found``.
    """
    return _if_removable(found, _of_routed(found, routed, labeled))


def _of_routed(found: Comparison, routed: Result, labeled: float) -> Iterator[Target]:
    where = f"{share(labeled)} of the labels"
    ends = found.get(BASE) is not None and found.get(ORACLE) is not None  # else nothing can be compared
    if labeled in REMOVED and ends and routed.condition.quality in (None, (1.0, 1.0)):
        goal, found_removed = (
            REMOVED[labeled],
            routed.removed,
        )  # None where the base knows no more than the perfect filter
        wanted = f"{where}: at least {share(goal)} removed"
        met, seeds = (found_removed.mean >= goal, found_removed.n) if found_removed else (None, routed.forget.n)
        yield Target("removed", wanted, ranged(found_removed, True, 1), met, seeds)
    limit = f"{where}: retain tax at most {TAX:.2f} nats against the filter with the same labels"
    if (tax := routed.retain_tax_same_labels) is not None:
        wanted = f"{limit}, at equal tokens"
        yield Target("tax", wanted, ranged(tax), tax.mean <= TAX, tax.n)
    if (equal := routed.retain_tax_equal_retain) is not None:
        wanted = f"{limit}, at equal retain text"
        yield Target("equal", wanted, ranged(equal), equal.mean <= TAX, equal.n)
    for method, name, least in (
        (FILTER, "the filter with the same labels", 1.0),
        (ORACLE, "the perfect filter", ROBUST),
    ):
        other = found.get(method, labeled, found.best_quality)
        if other is None or routed.worst is None or other.worst is None or (method == FILTER and labeled == 1):
            continue
        own, its = routed.worst.forget[-1], other.worst.forget[-1]
        wanted = f"{where}: forget loss after the worst attack " + (
            f"above that of {name}" if least == 1.0 else f"within {share(1 - least)} of {name}’s"
        )
        met = comparable(own.mean > least * its.mean, routed.worst, other.worst)
        kind = "filter" if method == FILTER else "robust"
        measured = f"{ranged(own)}{edge(routed.worst)} against {ranged(its)}{edge(other.worst)}"
        yield Target(kind, wanted, measured, met, min(own.n, its.n), bool(edge(routed.worst)))
    base = found.get(BASE)
    on = {side: routed.number(f"region_on_{side}_loss") for side in ("forget", "retain")}
    if base is not None and on["forget"] is not None and on["retain"] is not None:
        rises = {"forget": on["forget"].mean - base.forget.mean, "retain": on["retain"].mean - base.retain.mean}
        wanted = f"{where}: with its region on, at most {ON:.2f} nats above no routing on both sides"
        measured = ", ".join(f"{side} {signed(rise)}" for side, rise in rises.items())
        yield Target("on", wanted, measured, max(rises.values()) <= ON, min(on["forget"].n, base.forget.n))


def _of_placebos(found: Comparison) -> Iterator[Target]:
    base, labeled = found.get(BASE), 0.5 if 0.5 in found.shares else next(filter(None, found.shares), None)
    routed = found.get(routed_method(found), labeled, found.best_quality)
    if base is None or routed is None or routed.forget.mean <= base.forget.mean:
        return
    for method in in_order(found.methods):
        placebo = found.get(method)
        if card(method).family == "placebo" and placebo is not None:
            part = (placebo.forget.mean - base.forget.mean) / (routed.forget.mean - base.forget.mean)
            wanted = f"{card(method).name}: removes less than {share(PLACEBO)} of what routing removes"
            yield Target("placebo", wanted, share(part), part < PLACEBO, min(placebo.forget.n, routed.forget.n))


def _of_undo(found: Comparison) -> Iterator[Target]:
    labeled = max(found.shares, default=None)
    sweep = [found.get(name, labeled, found.best_quality) for name in in_order(found.methods) if name.startswith(UNDO)]
    results = [result for result in sweep if result is not None]
    oracle = found.get(ORACLE)
    for attack in found.attacks:
        swept = [r.attacks[attack] for r in results if attack in r.attacks]
        if len(swept) > 1:
            means = [one.forget[-1].mean for one in swept]
            wanted = f"attack “{attack}”: forget loss afterwards rises with UNDO’s alpha"
            met = means == sorted(means) if all(one.in_every_seed for one in swept) else None
            measured = " ".join(number(one.forget[-1].mean) + edge(one) for one in swept)
            seeds = min(one.forget[-1].n for one in swept)
            yield Target("alpha", wanted, measured, met, seeds, any(map(edge, swept)))
        fresh = found.get(f"{UNDO}1", labeled, found.best_quality)
        if oracle is None or fresh is None or not {attack} <= fresh.attacks.keys() & oracle.attacks.keys():
            continue
        yield from _of_recovery(
            fresh.attacks[attack],
            oracle.attacks[attack],
            least=FRESH,
            wanted=f"attack “{attack}”: distilled afresh at least {FRESH:g} × the steps to recover of the perfect filter",
        )


def _of_steps(found: Comparison) -> Iterator[Target]:
    routed = found.get(routed_method(found), 1.0, found.best_quality)
    for attack in found.attacks if routed is not None and routed.condition.labeled == 1 else ():
        for method, least, name in ((ORACLE, STEPS, "the perfect filter"), ("rmu", RMU, "RMU")):
            other = found.get(method, 1.0, found.best_quality)
            if routed is None or other is None or attack not in routed.attacks or attack not in other.attacks:
                continue
            yield from _of_recovery(
                routed.attacks[attack],
                other.attacks[attack],
                least=least,
                wanted=f"all labels, attack “{attack}”: at least {least:g} × the steps to recover of {name}",
            )


def _of_recovery(own: Relearning, its: Relearning, *, least: float, wanted: str) -> Iterator[Target]:
    """Yield a target on the steps to recover, where both are known."""
    if own.recovery is not None and its.recovery is not None:
        met = comparable(at_least(own.recovery, least, its.recovery), own, its)
        measured = f"{place(own.recovery)} against {place(its.recovery)}"
        yield Target("steps", wanted, measured, met, min(own.forget[-1].n, its.forget[-1].n), bool(edge(own)))


def comparable(met: bool | None, own: Relearning, its: Relearning) -> bool | None:
    """Return ``met`` where attacks on two models can be compared, and None where a failed attack would decide.

    An attack that failed in some seed, because it diverged, say, makes a model look more robust than it is: ours, so that a
    target is not known to be met, or the other one, so that it is not known to be missed.
    """
    if not (own.attacked and its.attacked):
        return None
    return met if (its if met is False else own).in_every_seed else None


def at_least(own: Crossing, factor: float, other: Crossing) -> bool | None:
    """Return whether ``own`` lies at ``factor`` times ``other`` or beyond; None where bounds do not tell, or both are 0.

    >>> at_least(Crossing(80, ">"), 3, Crossing(20)), at_least(Crossing(80, ">"), 3, Crossing(40))
    (True, None)
    >>> at_least(Crossing(40), 0.8, Crossing(80, ">")), at_least(Crossing(70), 0.8, Crossing(80, ">"))
    (False, None)
    >>> at_least(Crossing(0), 0.8, Crossing(0))  # neither had lost anything
    """
    if own == other == Crossing(0):
        return None
    enough = own.at >= factor * other.at
    if own.censored and other.censored:
        return None
    if own.censored:
        return True if enough else None
    if other.censored:
        return None if enough else False
    return enough
