"""Figures of an experiment: removal and its costs, shares of labels, relearning, and wrong labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from experiments.report.aggregate import BASE, ORACLE, Comparison, Quality, Result
from experiments.report.costs import costs
from experiments.report.lines import style
from experiments.report.methods import card, in_order
from experiments.report.points import Limits, Mark, draw_marks
from routed_peft.evaluation.measures import Spread
from routed_peft.report.checkpoints import ENVELOPE, Figure, Panel, attack_panel, common_reference
from routed_peft.report.drawing import LOSS, Draw, Line, Theme, curve, line, plot
from routed_peft.report.numbers import share

Value = Callable[[Result], Spread | None]
SEEDS = "Bands: lowest to highest seed."


def figures(found: Comparison, settings: Mapping[str, Any]) -> list[Figure]:
    """Return the figures for which there are data.

    Args:
        found: the experiment.
        settings: of it; they name the methods.
    """
    made = (_tradeoff, _by_labels, _relearning, _compute, _wrong_labels)
    return [figure for make in made if (figure := make(found, settings)).panels]


def after_worst(result: Result) -> Spread | None:
    """Return forget loss after the attack that brings back most; None where no attack was one."""
    return result.worst.forget[-1] if result.worst is not None and result.worst.attacked else None


def _tradeoff(found: Comparison, settings: Mapping[str, Any]) -> Figure:
    results = list(found.results.values())
    core = [result for result in results if card(result.condition.method).family != "output"] or results
    x_limits = _limits([result.retain for result in core], [result.retain for result in results])
    y_limits = _limits([result.forget for result in core], [result.forget for result in results])
    panels = []
    shares: list[float | None] = [*_shares(found)] or [None]
    for labeled in shares:
        marks = [
            Mark(card(r.condition.method, settings).label, r.retain, r.forget, style(r.condition.method))
            for r in found.at(labeled, found.best_quality)
        ]
        title = "Both losses" + _at(labeled)
        draw = _plane(marks, title, x_label=f"retain {LOSS}", x_limits=x_limits, y_limits=y_limits)
        panels.append(Panel(draw, f"Losses on both sides{_with(labeled)}. Crosses: lowest to highest seed."))
    about = "Forget loss against retain loss, after the removal and before any attack: up and to the left is the aim."
    return Figure("tradeoff", "What is removed, and what it costs", about, panels)


def _plane(marks: Sequence[Mark], title: str, *, x_label: str, x_limits: Limits, y_limits: Limits) -> Draw:
    """Return a function that draws forget loss against something else."""

    def draw(axes: Axes, theme: Theme) -> None:
        draw_marks(axes, theme, marks=marks, x_limits=x_limits, y_limits=y_limits)
        axes.set(title=title, xlabel=x_label, ylabel=f"forget {LOSS}")

    return draw


def _by_labels(found: Comparison, settings: Mapping[str, Any]) -> Figure:
    panels = []
    values: dict[str, Value] = {"ablated": lambda result: result.forget}
    if found.attacks:
        values["after the worst attack"] = after_worst
    for group in _groups(found) if len(found.shares) > 1 else ():
        for when, value in values.items():
            places = [(math.sqrt(labeled), labeled, found.best_quality) for labeled in found.shares]
            draw = plot(
                _lines(found, group, places=places, value=value, settings=settings),
                f"Forget loss, {when}",
                x_label="share of documents with a label (square-root scale)",  # small shares stand apart
                ticks={math.sqrt(labeled): share(labeled) for labeled in found.shares},
                ideal=_ideal(found, value),
            )
            panels.append(Panel(draw, f"Forget loss {when}, by share of labels."))
    about = (
        "Forget loss against the share of documents of either side that carry a label. A filter drops only what is labeled; "
        f"where a line lies above it, unlabeled forget data was kept out too. Level: methods that need no labels. {SEEDS}"
    )
    return Figure("labels", "How far labels carry", about, panels)


def _relearning(found: Comparison, settings: Mapping[str, Any]) -> Figure:
    panels = []
    shares: list[float | None] = [*sorted(_shares(found), key=lambda labeled: abs(labeled - 0.5))] or [None]
    for labeled in shares:
        for attack in found.attacks:
            for group in _groups(found):
                results = [found.get(method, labeled, found.best_quality) for method in group]
                own = {r.condition.method: r.attacks[attack] for r in results if r and attack in r.attacks}
                lines = [curve(card(method, settings).label, one, style(method)) for method, one in own.items()]
                level = common_reference([own[BASE]] if BASE in own else own.values())
                ideal = own[ORACLE].forget[0].max if ORACLE in own else None
                about, folded = _with(labeled), labeled != shares[0]
                panels += attack_panel(lines, own, attack=attack, about=about, level=level, ideal=ideal, folded=folded)
    return Figure("relearning", "Relearning", ENVELOPE, panels)


def _compute(found: Comparison, settings: Mapping[str, Any]) -> Figure:
    panels = []
    shares: list[float | None] = [*sorted(_shares(found), key=lambda labeled: abs(labeled - 0.5))] or [None]
    for labeled in shares:
        rows = [(r, costs(found, r).compute, after_worst(r)) for r in found.at(labeled, found.best_quality)]
        marks = [
            Mark(card(r.condition.method, settings).label, x, y, style(r.condition.method))
            for r, x, y in rows
            if x and y
        ]
        if len({mark.x.mean for mark in marks}) < 2:
            continue
        xs, ys = [mark.x for mark in marks], [mark.y for mark in marks]
        title = "Robustness and its cost" + _at(labeled)
        limits = {"x_limits": _limits(xs, xs), "y_limits": _limits(ys, ys)}
        draw = _plane(marks, title, x_label="compute, × no routing", **limits)
        panels.append(Panel(draw, f"Robustness and its cost{_with(labeled)}.", folded=labeled != shares[0]))
    about = (
        "Forget loss after the worst attack, against the floating-point operations of training over those of no routing: up "
        "and to the left is the aim. Crosses: lowest to highest seed."
    )
    return Figure("compute", "Robustness against compute", about, panels)


def _wrong_labels(found: Comparison, settings: Mapping[str, Any]) -> Figure:
    panels = []
    values: dict[str, Value] = {"Forget loss, ablated": lambda result: result.forget}
    if found.attacks:
        values["Forget loss, after the worst attack"] = after_worst
    values["Retain loss"] = lambda result: result.retain
    group = [method for method in in_order(found.methods) if card(method).family != "placebo"]
    for labeled in found.shares:
        here = [q for q in found.qualities if any(r.condition.quality == q for r in found.at(labeled, q))]
        places = [(i, labeled, quality) for i, quality in enumerate(here)]
        for title, value in values.items() if len(here) > 1 else ():
            draw = plot(
                _lines(found, group, places=places, value=value, settings=settings),
                title,
                x_label="recall, and below it precision, of the labels",
                ticks={i: f"{recall:g}\n{precision:g}" for i, (recall, precision) in enumerate(here)},
                y_label=LOSS,
            )
            panels.append(Panel(draw, f"{title}, by how right the labels are{_with(labeled)}."))
    about = (
        "Labels that are wrong: recall is the share of labeled forget documents that are called forget, precision the share "
        f"of those called forget that are. {SEEDS}"
    )
    return Figure("wrong_labels", "Wrong labels", about, panels)


def _groups(found: Comparison) -> list[list[str]]:
    """Return the methods of a plot: filters and routing; and unlearning by outputs, beside what it stands against."""
    methods = in_order(found.methods)
    first = [method for method in methods if card(method).family in ("reference", "filter", "routing")]
    outputs = [method for method in methods if card(method).family == "output"]
    beside = [method for method in methods if method in (BASE, "routed", ORACLE)]
    return [group for group in (first, in_order([*outputs, *beside]) if outputs else []) if group]


def _lines(
    found: Comparison,
    group: Sequence[str],
    *,
    places: Sequence[tuple[float, float, Quality | None]],
    value: Value,
    settings: Mapping[str, Any],
) -> list[Line]:
    """Return a line for every method of a group, over places that each have a share and a quality of labels.

    A method that was run at no share but 0 has none: there it is another method.
    """
    lines = []
    for method in group:
        results = [(x, r) for x, labeled, quality in places if (r := found.get(method, labeled, quality))]
        if any(r.condition.labeled != 0 for _, r in results):
            points = [(x, value(r)) for x, r in results]
            lines.append(line(card(method, settings).label, points, style(method)))
    return lines


def _shares(found: Comparison) -> list[float]:
    """Return the shares of labels with a panel of their own: at 0 every method is no routing or its placebo."""
    return [labeled for labeled in found.shares if labeled] or found.shares


def _ideal(found: Comparison, value: Value) -> float | None:
    oracle = found.get(ORACLE)
    ideal = value(oracle) if oracle is not None else None
    return None if ideal is None else ideal.max


def _limits(core: Sequence[Spread], every: Sequence[Spread]) -> Limits:
    """Return the limits of an axis: all of ``core``, and of the others what lies not much higher."""
    low, high = min(value.min for value in every), max(value.max for value in core)
    span = max(high - low, 0.05)
    high = min(max(value.max for value in every), high + 0.35 * span)
    return low - 0.08 * span, high + 0.1 * span


def _at(labeled: float | None) -> str:
    return "" if labeled is None else f", {share(labeled)} of labels"


def _with(labeled: float | None) -> str:
    return "" if labeled is None else f", {share(labeled)} of the documents labeled"
