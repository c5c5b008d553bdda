"""What a removal costs beside its tax, and what it lets through: read off the filters of the same experiment."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from routed_peft.evaluation.measures import Crossing, Spread, absorption, compute_penalty, leakage
from routed_peft.evaluation.report.aggregate import BASE, FILTER, ORACLE, Comparison, Result
from routed_peft.evaluation.report.attacks import spread


@dataclass(frozen=True)
class Costs:
    """What one row has cost; None where the experiment cannot tell.

    Attributes:
        compute: floating-point operations over those of no routing, seed by seed.
        serial_steps: optimizer steps, one after the other.
        labeled: forget tokens that somebody labelled.
        penalty: `compute_penalty` on retain text: the share of its retain tokens that it could have done without, had it
            been trained plainly.
        leakage: `leakage`: of the forget text that the filter with the same labels lets through, the share that would
            teach as much if all else were filtered.
        absorption: `absorption`: of the way that unlabelled forget data could have gone with the labelled.
        activity: mean over layers of how much more active the region is on forget than on retain text.
    """

    compute: Spread | None
    serial_steps: float | None
    labeled: float | None
    penalty: Crossing | None
    leakage: Crossing | None
    absorption: Spread | None
    activity: Spread | None

    @property
    def told(self) -> bool:
        """Whether anything is known."""
        return self.compute is not None or self.penalty is not None


def costs(found: Comparison, result: Result) -> Costs:
    """Return what a row of an experiment has cost.

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
    ratios_of_units = [
        cell["region_activity_ratio"] for cell in result.cells.values() if cell.get("region_activity_ratio")
    ]
    return Costs(
        compute=ratios or None,
        serial_steps=ledger.get("serial_steps"),
        labeled=ledger.get("labeled_forget_tokens"),
        penalty=_penalty(found, result),
        leakage=_leakage(found, result),
        absorption=_absorption(found, result),
        activity=spread(statistics.fmean(layers) for layers in ratios_of_units),
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
    return compute_penalty(result.retain.mean, trained, tokens, losses) if len(tokens) > 1 and trained else None


def _leakage(found: Comparison, result: Result) -> Crossing | None:
    condition = result.condition
    same = found.get(FILTER, condition.labeled, condition.quality)
    tokens, losses = _plain(found, "forget")
    if condition.labeled is None or same is None or same.condition.method != FILTER or len(tokens) < 2:
        return None
    through = same.over("tokens_by_side").get("forget")
    return leakage(result.forget.mean, through, tokens, losses) if through else None


def _absorption(found: Comparison, result: Result) -> Spread | None:
    base, oracle, labeled = found.get(BASE), found.get(ORACLE), result.condition.labeled
    if base is None or oracle is None or labeled is None or labeled >= 1:
        return None
    return spread(
        absorption({labeled: cell["forget_loss"]}, base.cells[s]["forget_loss"], oracle.cells[s]["forget_loss"])[
            labeled
        ]
        for s, cell in result.cells.items()
        if s in base.cells and s in oracle.cells
    )
