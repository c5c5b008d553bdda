"""Compute, penalty, leakage and absorption of a removal, read off the filters of the same experiment."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.report.aggregate import BASE, FILTER, ORACLE, Comparison, Result
from routed_peft.evaluation.measures import Crossing, Spread, absorption, compute_penalty, leakage
from routed_peft.report.attacks import spread


@dataclass(frozen=True)
class Costs:
    """Costs of one row; None where the experiment cannot tell.

    Attributes:
        compute: floating-point operations over those of no routing, seed by seed.
        serial_steps: optimizer steps, one after the other.
        labeled: forget tokens that somebody labeled.
        penalty: `compute_penalty`, of retain tokens alone: the share of these that it could have done without, had it been
            trained plainly. Plain models with more and less retain text, filters among them, make the curve.
        leakage: `leakage`: of the unlabeled forget text that it was trained on, the share that would teach as much if all
            else were filtered; None, too, where the filters tell no more than an upper bound of 1 or higher.
        absorption: `absorption`: the share of the unlabeled forget data that was removed as the labeled was.
        activity: mean over layers of how much more active the region is on forget than on retain text.
        layers: the same, layer by layer; None where the region is silent on retain text.
    """

    compute: Spread | None
    serial_steps: float | None
    labeled: float | None
    penalty: Crossing | None
    leakage: Crossing | None
    absorption: Spread | None
    activity: Spread | None
    layers: tuple[Spread | None, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether anything is known."""
        return self.compute is not None or self.penalty is not None


def costs(found: Comparison, result: Result) -> Costs:
    """Return the costs of a row of an experiment.

    Args:
        found: the experiment; its filters, at all shares of labels that are right, no routing and the perfect filter are what
            plain training gives for more and less text of either side, at equal steps.
        result: the row.
    """
    ledger, base = result.over("ledger"), found.get(BASE)
    ratios = base and spread(
        cell["ledger"]["flops"] / base.cells[seed]["ledger"]["flops"]
        for seed, cell in result.cells.items()
        if "ledger" in cell and "ledger" in base.cells.get(seed, {})
    )
    layers = [cell.get("region_activity_ratio") or () for cell in result.cells.values()]
    known = [[ratio for ratio in ratios if ratio is not None] for ratios in layers]  # None: silent on retain text
    return Costs(
        compute=ratios or None,
        serial_steps=ledger.get("serial_steps"),
        labeled=ledger.get("labeled_forget_tokens"),
        penalty=_penalty(found, result),
        leakage=_leakage(found, result),
        absorption=_absorption(found, result),
        activity=spread(statistics.fmean(ratios) for ratios in known if ratios),
        layers=tuple(spread(r for r in own if r is not None) for own in zip(*filter(None, layers), strict=True)),
    )


def _plain(found: Comparison, side: str) -> tuple[list[float], list[float]]:
    """Return tokens of a side, ascending, and the loss on it after so many, of models that were trained plainly."""
    quality = (1.0, 1.0) if (1.0, 1.0) in found.qualities else None
    rows = [found.get(BASE), found.get(ORACLE), *(found.get(FILTER, labeled, quality) for labeled in found.shares)]
    points = {
        row.over("tokens_by_side")[side]: (row.forget if side == "forget" else row.retain).mean
        for row in _unique(rows)
        if row.over("tokens_by_side").get(side)
    }
    tokens = sorted(points)
    return tokens, [points[count] for count in tokens]


def _unique(rows: Iterable[Result | None]) -> list[Result]:
    plain = (row for row in rows if row is not None and row.condition.method in (BASE, ORACLE, FILTER))
    return list({row.condition: row for row in plain}.values())


def _penalty(found: Comparison, result: Result) -> Crossing | None:
    tokens, losses = _plain(found, "retain")
    trained = result.over("tokens_by_side").get("retain")
    return (
        compute_penalty(result.retain.mean, trained, tokens=tokens, losses=losses)
        if len(tokens) > 1 and trained
        else None
    )


def _leakage(found: Comparison, result: Result) -> Crossing | None:
    tokens, losses = _plain(found, "forget")
    unlabeled = result.over("unlabeled_tokens_by_side").get("forget")
    if result.condition.method == FILTER and result.condition.quality == (1.0, 1.0):  # all the forget text that it sees
        unlabeled = result.over("tokens_by_side").get("forget")
    if not unlabeled or len(tokens) < 2:
        return None
    through = leakage(result.forget.mean, unlabeled, tokens=tokens, losses=losses)
    return None if through.relation == "<" and through.at >= 1 else through  # that much is no news


def _absorption(found: Comparison, result: Result) -> Spread | None:
    oracle, labeled = found.get(ORACLE), result.condition.labeled
    same = found.get(FILTER, labeled, result.condition.quality)
    if oracle is None or labeled is None or same is None or same.condition.method != FILTER or labeled in (0, 1):
        return None
    return spread(
        absorption(cell["forget_loss"], same.cells[seed]["forget_loss"], oracle.cells[seed]["forget_loss"])
        for seed, cell in result.cells.items()
        if seed in same.cells and seed in oracle.cells
    )
