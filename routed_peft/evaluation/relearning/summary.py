"""What came of an attack: its envelope, how soon it recovers what was removed, and whether it was one at all."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from routed_peft.evaluation.measures import (
    WorstCase,
    recovered,
    relearning_area,
    to_recover,
    within_utility,
    worst_case,
)
from routed_peft.evaluation.measures.relearning import TOLERANCE
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import Curve
from routed_peft.training.records import SUMMARY

FORMAT, KIND = 1, "relearning"
_RESULT = ("envelope", "curves", "verdict", "interior", "learning_rates", "start", "target")
RISE = 0.05
"""How much a useful model's retain loss may have risen by an attack, as a share."""


def summarise(
    attack: Attack, curves: Sequence[Curve], reference: float | None = None, oracle: Sequence[float] | None = None
) -> dict[str, Any]:
    """Sum up the curves of one attack.

    Args:
        attack: that they are of.
        curves: what `relearn` returns: every rate with every seed.
        reference: the target's loss of the model from which nothing was removed, where it is known.
        oracle: the perfect filter's loss at every step of the same attack, where it is known.

    Returns:
        ``verdict``: "attack", or "no attack" where no rate lowered the loss by `TOLERANCE`, or "diverged" where all diverged.
        ``envelope``: one entry for each step, see `WorstCase`; with ``tokens``, ``retain`` and whether the rate was
        ``interior`` to the grid. ``useful``: the same, limited to states whose retain loss rose by 5 % at most. ``recovery``
        of either, where there is a reference: ``steps`` and ``tokens`` (see `to_recover`; None where nothing was trained, and
        tokens also where no curve is whole) and the ``share`` at the last step (see `recovered`). All
        three are None too where the verdict is not "attack". ``area`` under the curve between reference and perfect filter
        (`relearning_area`), where both are known and it was an attack. ``start``, ``interior`` at the last step (not where
        there was no attack), ``learning_rates`` with their statuses, ``curves``.
    """
    rates = sorted({curve.learning_rate for curve in curves})
    by_rate = {rate: [curve for curve in curves if curve.learning_rate == rate] for rate in rates}
    start = {name: statistics.fmean(curve.start[name] for curve in curves) for name in curves[0].start}
    retain = {rate: [curve.losses("retain") for curve in own] for rate, own in by_rate.items()}
    result: dict[str, Any] = {
        "attack": asdict(attack),
        "target": attack.target,
        "start": start,
        "reference": reference,
        "learning_rates": {f"{rate:g}": [curve.status for curve in own] for rate, own in by_rate.items()},
    }
    result |= _envelope(by_rate, retain, attack.target, start, reference)
    result["interior"] = result["envelope"][-1]["interior"]
    useful = within_utility(retain, start["retain"], RISE) if "retain" in start else None
    if useful is not None and any(
        math.isfinite(loss) for own in useful.values() for curve in own for loss in curve[:1]
    ):
        result["useful"] = _envelope(by_rate, retain, attack.target, start, reference, useful)
    statuses = {curve.status for curve in curves}
    lowered = result["envelope"][-1]["mean"] < start[attack.target] - TOLERANCE
    result["interior"] = lowered and result["interior"]
    result["verdict"] = "attack" if lowered else "diverged" if statuses == {"diverged"} else "no attack"
    for part in (result, result.get("useful", {})):
        if "recovery" in part and not lowered:  # what was no attack says nothing of robustness
            part["recovery"] |= {"steps": None, "tokens": None, "share": None}
    if oracle is not None and reference is not None and lowered:
        envelope = result["envelope"]
        steps, losses = [point["step"] for point in envelope], [point["mean"] for point in envelope]
        result["area"] = relearning_area(steps, losses, reference, oracle)
    result["curves"] = [_curve(curve) for curve in curves]
    return result


def _envelope(
    by_rate: Mapping[float, Sequence[Curve]],
    retain: Mapping[float, Sequence[Sequence[float]]],
    target: str,
    start: Mapping[str, float],
    reference: float | None,
    allowed: Mapping[float, Sequence[Sequence[float]]] | None = None,
) -> dict[str, Any]:
    rates = list(by_rate)
    curves = [curve for own in by_rate.values() for curve in own]
    steps = [point.step for point in curves[0].points]
    losses = {rate: [curve.losses(target) for curve in own] for rate, own in by_rate.items()}
    whole = [curve for curve in curves if all(map(math.isfinite, curve.losses(target)))]  # the others stopped early
    tokens = [statistics.fmean(curve.points[i].tokens for curve in whole or curves) for i in range(len(steps))]
    cases = worst_case(steps, losses, allowed)

    def entry(case: WorstCase, tokens: float) -> dict[str, Any]:
        at = steps.index(case.at)
        cost = statistics.fmean(curve[at] for curve in retain[case.learning_rate])
        inside = rates[0] < case.learning_rate < rates[-1] or case.at == 0
        return case.as_dict() | {"tokens": tokens, "retain": cost, "interior": inside}

    means = [case.mean for case in cases]
    result: dict[str, Any] = {"envelope": [entry(case, count) for case, count in zip(cases, tokens, strict=True)]}
    if reference is not None:
        trained = steps[-1] > 0
        result["recovery"] = {
            "steps": to_recover(steps, means, reference).as_dict() if trained else None,
            "tokens": to_recover(tokens, means, reference).as_dict() if trained and whole else None,
            "share": recovered(start[target], means[-1], reference),
        }
    return result


def _curve(curve: Curve) -> dict[str, Any]:
    points = [{"step": point.step, "tokens": point.tokens, **point.scores} for point in curve.points]
    return {"learning_rate": curve.learning_rate, "seed": curve.seed, "status": curve.status, "points": points}


def read_summary(place: str | Path) -> dict[str, Any]:
    """Read the ``summary.json`` of a relearning run.

    Args:
        place: the file, or the directory that it is in.

    Raises:
        ValueError: where there is none, it is of something else, or of another version of this library.
    """
    file = Path(place) / SUMMARY if Path(place).is_dir() else Path(place)
    if not file.is_file():
        raise ValueError(
            f"{str(file)!r} is not there: was `routed-peft relearn` interrupted? The same command continues it"
        )
    summary = json.loads(file.read_text(encoding="utf-8"))
    if summary.get("kind") != KIND:
        raise ValueError(
            f"{str(file)!r} is no summary of relearning: give the `--out` directory of `routed-peft relearn`"
        )
    if summary.get("format") != FORMAT:
        raise ValueError(
            f"{str(file)!r} has the format {summary.get('format')}, this version of routed_peft reads {FORMAT}: run the "
            "command again that wrote it (its run.json names it; finished curves are kept)"
        )
    if not isinstance(summary.get("attacks"), dict):
        raise ValueError(f"{str(file)!r} lacks its attacks: was the file changed by hand?")
    for name, result in summary["attacks"].items():
        if missing := [key for key in _RESULT if key not in result]:
            raise ValueError(
                f"the attack {name!r} of {str(file)!r} lacks {', '.join(missing)}: was the file changed by hand?"
            )
    return dict(summary)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the table for the terminal: one row an attack."""
    table = Table(
        title=f"{summary['source']} under attack", caption="worst case over learning rates and earlier steps, nats"
    )
    areas = any("area" in result for result in summary["attacks"].values())
    for name in (
        "attack",
        "loss before",
        "after",
        "seeds",
        "learning rate",
        "retain after",
        "recovered",
        "steps to recover",
        "tokens",
        *(["area"] if areas else []),
    ):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for name, result in summary["attacks"].items():
        last = result["envelope"][-1]
        if result["verdict"] == "attack":
            rate = f"{last['learning_rate']:g}" if last["learning_rate"] else "–"
            edge = "" if result["interior"] or not last["learning_rate"] else " (edge of the grid)"
            cells = [
                f"{last['mean']:.3f}",
                f"{last['min']:.3f} … {last['max']:.3f}",
                rate + edge,
                f"{last['retain']:.3f}",
            ]
        else:
            cells = [result["verdict"], "", "", ""]
        recovery = result.get("recovery") or {}
        steps, share = recovery.get("steps"), recovery.get("share")
        back = "–" if share is None else f"{share:.0%}"
        when = [_crossing(steps, ".4g"), _crossing(recovery.get("tokens"), ",.0f")]
        area = [f"{result['area']:.2f}" if "area" in result else "–"] if areas else []
        table.add_row(name, f"{result['start'][result['target']]:.3f}", *cells, back, *when, *area)
    return table


def _crossing(found: Mapping[str, Any] | None, form: str) -> str:
    return "–" if found is None else ("> " if found["censored"] else "") + format(found["at"], form)
