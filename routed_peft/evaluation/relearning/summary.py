"""Summaries of attacks: worst case, recovery and verdict, as JSON and as tables for the terminal."""

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

from routed_peft.deprecation import formerly_positional
from routed_peft.evaluation.measures import relearning_area, share_relearned, to_recover
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import BOUNDS, Curve
from routed_peft.evaluation.relearning.envelope import Envelope, State
from routed_peft.runs.records import SUMMARY

FORMAT, KIND = 1, "relearning"
_RESULT = ("envelope", "curves", "verdict", "interior", "learning_rates", "start", "target")


@formerly_positional("reference", "oracle")
def summarize(
    attack: Attack, curves: Sequence[Curve], *, reference: float | None = None, oracle: Sequence[float] | None = None
) -> dict[str, Any]:
    """Summarize the curves of one attack: every rate with every seed, from `relearn`.

    ``reference`` is the target's loss of the model from which nothing was removed, and ``oracle`` the perfect filter's loss
    at every step of the same attack, where they are known.

    Returns:
        The entry of ``summary.json``:
        The entry of ``summary.json``: the attack, its ``target`` (the loss to be lowered), the ``reference`` as given, and

        - ``verdict``: see `Envelope`.
        - ``start``: name -> loss of the original model, in nats per token.
        - ``learning_rates``: rate -> statuses of its curves, seed by seed (`Curve.status`).
        - ``envelope``: for each step the fields of `State`, and the mean ``tokens`` of the attacker so far.
        - ``interior``: at the last step; false where there was no attack.
        - ``useful``: the ``envelope`` over states with a retain loss at most 5 % above the start, and its ``recovery``;
          missing if there is none.
        - ``recovery``: missing without a reference. ``steps`` and ``tokens`` come from `to_recover`, ``share`` from
          `share_relearned` at the last step. All are None if there was no attack, ``steps`` and ``tokens`` if nothing was
          trained, ``tokens`` if no curve is complete.
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
    steps, statuses = [point.step for point in curves[0].points], {curve.status for curve in curves}
    before: dict[str, Any] = {"before": start[attack.target], "retain_before": start.get("retain")}
    found = Envelope.from_losses(steps, losses, retain=retain, **before, statuses=statuses, bounds=(low, high))
    attacked = found.verdict == "attack"
    summarized = _EnvelopeSummary(attack, curves, attacked=attacked, before=start[attack.target], reference=reference)
    result: dict[str, Any] = {"attack": asdict(attack), "target": attack.target, "verdict": found.verdict}
    result |= {"start": start, "reference": reference}
    result["learning_rates"] = {f"{rate:g}": [curve.status for curve in own] for rate, own in by_rate.items()}
    result |= {"interior": attacked and found.states[-1].interior, **summarized.entries(found.states)}
    if found.useful is not None:
        result["useful"] = summarized.entries(found.useful)
    if oracle is not None and reference is not None and attacked and steps[-1] > 0:
        means = [state.case.mean for state in found.states]
        result["area"] = relearning_area(steps, means, base=reference, oracle=oracle)
    result["curves"] = [
        {name: getattr(curve, name) for name in ("learning_rate", "seed", "status")}
        | {"points": [{"step": p.step, "tokens": p.tokens, **p.scores} for p in curve.points]}
        for curve in curves
    ]
    return result


class _EnvelopeSummary:
    """Entries of a summary about states of an envelope: tokens, and recovery where a reference is known."""

    def __init__(
        self, attack: Attack, curves: Sequence[Curve], *, attacked: bool, before: float, reference: float | None
    ) -> None:
        self.steps = [point.step for point in curves[0].points]
        # curves that left the numbers stopped early
        complete = [curve for curve in curves if all(map(math.isfinite, curve.losses(attack.target)))]
        measured = complete or curves
        self.tokens = [statistics.fmean(curve.points[i].tokens for curve in measured) for i in range(len(self.steps))]
        self.complete, self.attacked, self.before, self.reference = bool(complete), attacked, before, reference

    def entries(self, states: Sequence[State]) -> dict[str, Any]:
        """Return ``envelope`` and, with a reference, ``recovery``."""
        envelope = [state.as_dict() | {"tokens": count} for state, count in zip(states, self.tokens, strict=True)]
        if self.reference is None:
            return {"envelope": envelope}
        means, trained = [state.case.mean for state in states], self.attacked and self.steps[-1] > 0
        steps, tokens = (
            to_recover(places, means, reference=self.reference).as_dict() if asked else None
            for places, asked in ((self.steps, trained), (self.tokens, trained and self.complete))
        )
        share = share_relearned(self.before, means[-1], self.reference) if self.attacked else None
        return {"envelope": envelope, "recovery": {"steps": steps, "tokens": tokens, "share": share}}


def read_summary(place: str | Path) -> dict[str, Any]:
    """Read the ``summary.json`` of a relearning run.

    Raises:
        ValueError: where there is none, it belongs to something else, or another version of this library wrote it.
    """
    file = Path(place) / SUMMARY if Path(place).is_dir() else Path(place)
    name = repr(str(file))
    if not file.is_file():
        raise ValueError(f"{name} does not exist: was `routed-peft relearn` interrupted? The same command continues it")
    summary = json.loads(file.read_text(encoding="utf-8"))
    if summary.get("kind") != KIND:
        raise ValueError(f"{name} is no summary of relearning: give the `--out` directory of `routed-peft relearn`")
    if summary.get("format") != FORMAT:
        raise ValueError(f"{name} has the format {summary.get('format')}, this version of routed_peft reads {FORMAT}: "
                         "repeat the command in its run.json; finished curves are kept")  # fmt: skip
    changed = "was the file changed by hand?"
    if not isinstance(summary.get("attacks"), dict):
        raise ValueError(f"{name} lacks its attacks: {changed}")
    for attack, result in summary["attacks"].items():
        if missing := [key for key in _RESULT if key not in result]:
            raise ValueError(f"the attack {attack!r} of {name} lacks {', '.join(missing)}: {changed}")
    return dict(summary)


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return tables for the terminal, one row per attack: losses, and recovery where a reference is known."""
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
    back = _table("", ["attack", "share relearned", "steps to recover", "tokens", *(["area"] if areas else [])], None)
    for name, result in known.items():
        steps, tokens, share = (result["recovery"][key] for key in ("steps", "tokens", "share"))
        area = [f"{result['area']:.2f}" if "area" in result else "–"] if areas else []
        came = "–" if share is None else f"{share:.0%}"
        back.add_row(name, came, _crossing(steps, ".4g"), _crossing(tokens, ",.0f"), *area)
    return [losses, back]


def _table(title: str, columns: Sequence[str], caption: str | None) -> Table:
    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=title or None, caption=caption, box=box.SIMPLE_HEAD, **left)
    for name in columns:
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=name == "attack")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"  # JSON has None for NaN


def _range(low: float | None, high: float | None) -> str:
    return "–" if _number(low) == "–" else f"{low:.2f}–{high:.2f}"


def _crossing(found: Mapping[str, Any] | None, form: str) -> str:
    return "–" if found is None else ("> " if found["censored"] else "") + format(found["at"], form)
