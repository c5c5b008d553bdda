"""What came of an attack: its envelope, how soon it recovers what was removed, and whether it was one at all."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from routed_peft.evaluation.measures import recovered, relearning_area, to_recover
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import BOUNDS, Curve
from routed_peft.evaluation.relearning.envelope import Outcome, State
from routed_peft.runs.records import SUMMARY

FORMAT, KIND = 1, "relearning"
_RESULT = ("envelope", "curves", "verdict", "interior", "learning_rates", "start", "target")


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
        A dict, as ``summary.json`` has it:

        - ``attack``, ``target``: what was done, and which loss was to be lowered.
        - ``verdict``: see `Outcome`.
        - ``start``: name -> loss before anything was done, in nats per token.
        - ``reference``: as given.
        - ``learning_rates``: rate -> what became of its curves, seed by seed (`Curve.status`).
        - ``envelope``: an entry for each step: what `State` has, and the mean ``tokens`` of the attacker by then.
        - ``interior``: at the last step; false where there was no attack.
        - ``useful``: the ``envelope`` over states whose retain loss rose by 5 % at most, and its ``recovery``; missing where
          there is none.
        - ``recovery``: missing without a reference. Its ``steps`` and ``tokens`` are as `to_recover` has them, its ``share``
          at the last step as `recovered` has it; all None where there was no attack, ``steps`` and ``tokens`` where nothing
          was trained, ``tokens`` where no curve is whole.
        - ``area``: `relearning_area`; missing without an attack, a reference or an oracle.
        - ``curves``: all of them, point by point.
    """
    rates = sorted({curve.learning_rate for curve in curves})
    by_rate = {rate: [curve for curve in curves if curve.learning_rate == rate] for rate in rates}
    start = {name: statistics.fmean(curve.start[name] for curve in curves) for name in curves[0].start}
    losses, retain, low, high = (
        {rate: [curve.losses(name) for curve in own] for rate, own in by_rate.items()}
        for name in (attack.target, "retain", *(attack.target + end for end in BOUNDS))
    )
    steps = [point.step for point in curves[0].points]
    found = Outcome.of(
        steps,
        losses,
        retain,
        start[attack.target],
        start.get("retain"),
        {curve.status for curve in curves},
        (low, high),
    )
    attacked = found.verdict == "attack"
    whole = [curve for curve in curves if all(map(math.isfinite, curve.losses(attack.target)))]  # others stopped early
    tokens = [statistics.fmean(curve.points[i].tokens for curve in whole or curves) for i in range(len(steps))]

    def recovery(means: Sequence[float], reference: float) -> dict[str, Any]:
        trained = attacked and steps[-1] > 0
        return {
            "steps": to_recover(steps, means, reference).as_dict() if trained else None,
            "tokens": to_recover(tokens, means, reference).as_dict() if trained and whole else None,
            "share": recovered(start[attack.target], means[-1], reference) if attacked else None,
        }

    def part(states: Sequence[State]) -> dict[str, Any]:
        envelope = [state.as_dict() | {"tokens": count} for state, count in zip(states, tokens, strict=True)]
        known = {} if reference is None else {"recovery": recovery([state.case.mean for state in states], reference)}
        return {"envelope": envelope, **known}

    result: dict[str, Any] = {
        "attack": asdict(attack),
        "target": attack.target,
        "verdict": found.verdict,
        "start": start,
        "reference": reference,
        "learning_rates": {f"{rate:g}": [curve.status for curve in own] for rate, own in by_rate.items()},
        "interior": attacked and found.envelope[-1].interior,
        **part(found.envelope),
    }
    if found.useful is not None:
        result["useful"] = part(found.useful)
    if oracle is not None and reference is not None and attacked and steps[-1] > 0:
        means = [state.case.mean for state in found.envelope]
        result["area"] = relearning_area(steps, means, reference, oracle)
    return result | {"curves": [_curve(curve) for curve in curves]}


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


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return tables for the terminal, a row an attack: losses, and what came back where it is known what there was."""
    losses = _table(
        f"{summary['source']} under attack",
        ["attack", "loss before", "after", "seeds", "documents", "learning rate", "retain after"],
        "worst case over learning rates and earlier steps, nats; *: at the edge of the grid",
    )
    for name, result in summary["attacks"].items():
        last = result["envelope"][-1]
        cells = [result["verdict"], "", "", "", ""]
        if result["verdict"] == "attack":
            rate = f"{last['learning_rate']:g}" if last["learning_rate"] else "–"
            edge = "" if result["interior"] or not last["learning_rate"] else " *"
            ranges = _range(last["min"], last["max"]), _range(*last["documents"])
            cells = [f"{last['mean']:.3f}", *ranges, rate + edge, _number(last["retain"])]
        losses.add_row(name, f"{result['start'][result['target']]:.3f}", *cells)
    known = {name: result for name, result in summary["attacks"].items() if "recovery" in result}
    if not known:
        return [losses]
    areas = any("area" in result for result in known.values())
    back = _table("", ["attack", "recovered", "steps to recover", "tokens", *(["area"] if areas else [])], None)
    for name, result in known.items():
        steps, tokens, share = (result["recovery"][key] for key in ("steps", "tokens", "share"))
        area = [f"{result['area']:.2f}" if "area" in result else "–"] if areas else []
        came = "–" if share is None else f"{share:.0%}"
        back.add_row(name, came, _crossing(steps, ".4g"), _crossing(tokens, ",.0f"), *area)
    return [losses, back]


def _table(title: str, columns: Sequence[str], caption: str | None) -> Table:
    table = Table(
        title=title or None, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=name == "attack")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"  # JSON has None for NaN


def _range(low: float | None, high: float | None) -> str:
    return "–" if _number(low) == "–" else f"{low:.2f}–{high:.2f}"


def _crossing(found: Mapping[str, Any] | None, form: str) -> str:
    return "–" if found is None else ("> " if found["censored"] else "") + format(found["at"], form)
