"""Lines of figures: how each method looks, and plots of losses against labels, steps or the quality of labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from routed_peft.evaluation.measures import Spread
from routed_peft.evaluation.report.attacks import Relearning
from routed_peft.evaluation.report.cards import UNDO, VARIANT
from routed_peft.evaluation.report.drawing import Draw, Line, Style, Theme, draw_lines

LOSS = "loss (nats per token)"
STYLES = {
    "no_routing": Style("grey"),
    "control": Style("grey", ":", "s", 1.5),
    "random_units": Style("grey", "--", "D", 1.5),
    "filter": Style("orange"),
    "filter_equal_retain": Style("orange", ":", "^", 1.5),
    "classifier_filter": Style("orange", "--", "s"),
    "classifier_filter_balanced": Style("orange", "--", "D"),
    "classifier_filter_overrule": Style("orange", "-.", "v"),
    "era": Style("sky", ":", "x", 1.5),
    "era_coherent": Style("sky", ":", "^"),
    "demix": Style("sky", "-.", "D"),
    "sgtm": Style("sky", "--", "s"),
    "routed": Style("blue", width=2.8),
    "routed_undo": Style("blue", "--", "v"),
    "perfect_filter": Style("green"),
    "gradient_ascent": Style("purple", ":", "o"),
    "graddiff": Style("purple"),
    "npo": Style("purple", "--", "s"),
    "simnpo": Style("purple", ":", "^"),
    "rmu": Style("purple", "-.", "D"),
    "maxent": Style("purple", "-", "v", 1.2),
    "undo": Style("sky"),
}
OTHERS = tuple(
    Style(color, dashes) for dashes in ("-", "--", ":") for color in ("blue", "orange", "green", "purple", "grey")
)
"""For what has no style of its own, in turn."""


def style(method: str) -> Style:
    """Return how a method is drawn; those that are not known look alike, and are told apart by their names."""
    base, _, changes = method.partition(VARIANT)
    if changes:
        return replace(style(base), dashes=":", marker="d", width=1.5)
    return STYLES.get("undo" if method.startswith(UNDO) else method, Style("purple", "--", "X"))


def line(name: str, points: Iterable[tuple[float, Spread | None]], look: Style) -> Line:
    """Return the line of means, with the seeds' range as its band; points without a value are left out."""
    found = [(x, value) for x, value in points if value is not None]
    return Line(name, [(x, v.mean) for x, v in found], look, [(v.min, v.max) for _, v in found])


def curve(name: str, one: Relearning, look: Style) -> Line:
    """Return a relearning curve over log(1 + step), which says so where no attack took place."""
    points = zip(map(math.log1p, one.steps), one.forget, strict=True)
    return line(name if one.attacked else f"{name} ({one.verdict})", points, look)


def plot(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    ticks: Mapping[float, str],
    y_label: str = f"forget {LOSS}",
    ideal: float | None = None,
    level: float | None = None,
) -> Draw:
    """Return what draws lines.

    Args:
        lines: to draw.
        title: of the panel.
        x_label: what is on the horizontal axis.
        ticks: place -> its name, on that axis.
        y_label: what is on the other.
        ideal: highest loss of the perfect filter; the plot ends not far above it, so that a broken model does not press all
            others flat.
        level: where a dotted line goes.
    """
    heights = [y for one in lines for _, y in one.points]
    top = math.inf if ideal is None or not heights else ideal + 0.4 * max(0.1, ideal - min(heights))

    def draw(axes: Axes, theme: Theme) -> None:
        draw_lines(axes, theme, lines, top=top)
        if level is not None:
            axes.axhline(level, color=theme.text, linestyle=":", linewidth=1)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xticks(list(ticks), list(ticks.values()))

    return draw
