"""Summaries of attacks: worst case, recovery and verdict, as JSON and as tables for the terminal."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from routed_peft.deprecation import formerly_positional
from routed_peft.evaluation.measures import (
    WorstCase,
    relearning_area,
    share_relearned,
    to_recover,
    within_utility,
    worst_case,
)
from routed_peft.evaluation.measures.robustness import TOLERANCE, Losses, kept_states
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import BOUNDS, Curve
from routed_peft.runs.records import SUMMARY

FORMAT, KIND = 1, "relearning"
_RESULT = ("envelope", "curves", "verdict", "interior", "learning_rates", "start", "target")


@dataclass(frozen=True)
class State:
    """The attacker's best model by one step; NaN where a loss was not measured."""

    case: WorstCase  # the lowest loss so far
    retain: float  # retain loss of that model, the mean over seeds
    documents: tuple[float, float]  # 95 % confidence interval of the loss over documents, ends being means over seeds
    interior: bool  # its learning rate lies inside the grid, so that no rate beyond would do better

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self.case) | {"retain": self.retain, "documents": list(self.documents), "interior": self.interior}


@dataclass(frozen=True)
class Envelope:
    """The worst case of an attack.

    Its verdict is "attack"; "no attack" where no rate lowered the loss by `TOLERANCE`; "diverged" where all rates diverged.
    """

    states: list[State]  # one for every step
    useful: list[State] | None  # the same among states with a retain loss at most 5 % above the start; None without any
    verdict: str

    @classmethod
    def from_losses(
        cls,
        steps: Sequence[int],
        losses: Losses,
        *,
        retain: Losses,
        before: float,
        retain_before: float | None,
        statuses: set[str],
        bounds: tuple[Losses, Losses] | None = None,
    ) -> Envelope:
        """Summarize curves: losses of the attacker's target and of retain text, and ends of intervals over documents.

        ``before`` and ``retain_before`` are losses of the original model, ``statuses`` those of all curves.

        >>> losses = {1e-3: [[5.0, 4.0, 3.5]], 1e-2: [[5.0, 3.0, 6.0]]}
        >>> retain = {1e-3: [[2.0, 2.0, 2.0]], 1e-2: [[2.0, 2.5, 4.0]]}
        >>> known = dict(before=5.0, retain_before=2.0, statuses={"attack"})
        >>> found = Envelope.from_losses([0, 5, 20], losses, retain=retain, **known)
        >>> last = found.states[-1]
        >>> last.case.mean, last.retain, last.interior, found.useful[-1].case.mean, found.verdict
        (3.0, 2.5, False, 3.5, 'attack')
        """
        rates = list(losses)

        def state(case: WorstCase) -> State:
            index, rate = steps.index(case.at), case.learning_rate
            kept = [kept_states(curve)[index] for curve in losses[rate]]
            at = lambda scores: statistics.fmean(own[i] for own, i in zip(scores[rate], kept, strict=True))
            low, high = (math.nan if bounds is None else at(bounds[end]) for end in (0, 1))
            inside = case.at == 0 or rates[0] < case.learning_rate < rates[-1]
            return State(case, at(retain), (low, high), inside)

        states = [state(case) for case in worst_case(steps, losses)]
        allowed = {} if retain_before is None else within_utility(retain, retain_before)
        # rounding or perturbing may leave no useful state at all
        useful = any(math.isfinite(curve[0]) for own in allowed.values() for curve in own)
        lowered = states[-1].case.mean < before - TOLERANCE
        return cls(
            states=states,
            useful=[state(case) for case in worst_case(steps, losses, allowed)] if useful else None,
            verdict="attack" if lowered else "diverged" if statuses == {"diverged"} else "no attack",
        )


@formerly_positional("reference", "oracle")
def summarize(
    attack: Attack, curves: Sequence[Curve], *, reference: float | None = None, oracle: Sequence[float] | None = None
) -> dict[str, Any]:
    """Summarize the curves of one attack: every rate with every seed, from `relearn`.

    ``reference`` is the target's loss of the model from which nothing was removed, and ``oracle`` the perfect filter's loss at
    every step of the same attack, where they are known.

    Returns:
        The entry of ``summary.json``: the attack, its ``target`` (the loss to be lowered), the ``reference`` as given, and

        - ``verdict``: see `Envelope`.
        - ``start``: name -> loss of the original model, in nats per token.
        - ``learning_rates``: rate -> statuses of its curves, seed by seed (`Curve.status`).
        - ``envelope``: for each step the fields of `State`, and the mean ``tokens`` of the attacker so far.
        - ``interior``: at the last step; false where there was no attack.
        - ``useful``: the ``envelope`` over states with a retain loss at most 5 % above the start, and its ``recovery``, if any.
        - ``recovery``, with a reference: ``steps`` and ``tokens`` from `to_recover`, ``share`` from `share_relearned` at the
          last step. All are None if there was no attack, ``steps`` and ``tokens`` if nothing was trained, ``tokens`` if no
          curve is complete.
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
    known: dict[str, Any] = {"attacked": attacked, "before": start[attack.target], "reference": reference}
    result: dict[str, Any] = {"attack": asdict(attack), "target": attack.target, "verdict": found.verdict}
    result |= {"start": start, "reference": reference}
    result["learning_rates"] = {f"{rate:g}": [curve.status for curve in own] for rate, own in by_rate.items()}
    result |= {"interior": attacked and found.states[-1].interior, **_recovery(found.states, curves, **known)}
    if found.useful is not None:
        result["useful"] = _recovery(found.useful, curves, **known)
    if oracle is not None and reference is not None and attacked and steps[-1] > 0:
        means = [state.case.mean for state in found.states]
        result["area"] = relearning_area(steps, means, base=reference, oracle=oracle)
    result["curves"] = [
        {name: getattr(curve, name) for name in ("learning_rate", "seed", "status")}
        | {"points": [{"step": p.step, "tokens": p.tokens, **p.scores} for p in curve.points]}
        for curve in curves
    ]
    return result


def _recovery(
    states: Sequence[State], curves: Sequence[Curve], *, attacked: bool, before: float, reference: float | None
) -> dict[str, Any]:
    """Return ``envelope`` and, with a reference, ``recovery``."""
    # curves that left the numbers stopped early
    complete = [curve for curve in curves if all(map(math.isfinite, curve.losses(curve.target)))]
    steps = [point.step for point in curves[0].points]
    tokens = [statistics.fmean(curve.points[i].tokens for curve in complete or curves) for i in range(len(steps))]
    envelope = [state.as_dict() | {"tokens": count} for state, count in zip(states, tokens, strict=True)]
    if reference is None:
        return {"envelope": envelope}
    means, trained = [state.case.mean for state in states], attacked and steps[-1] > 0
    asked: dict[str, tuple[Sequence[float], bool]] = {"steps": (steps, trained)}
    asked["tokens"] = tokens, trained and bool(complete)
    found: dict[str, Any] = {
        name: to_recover(places, means, reference=reference).as_dict() if known else None
        for name, (places, known) in asked.items()
    }
    share = share_relearned(before, means[-1], reference) if attacked else None
    return {"envelope": envelope, "recovery": found | {"share": share}}


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
