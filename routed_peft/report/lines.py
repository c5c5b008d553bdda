"""Plots of lines over steps, shares of labels and the like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from routed_peft.evaluation.measures import Spread
from routed_peft.report.attacks import Relearning
from routed_peft.report.drawing import Axes, Draw, Line, Style, Theme, draw_lines

LOSS = "loss (nats per token)"
OTHERS = tuple(
    Style(color, dashes) for dashes in ("-", "--", ":") for color in ("blue", "orange", "green", "purple", "grey")
)
"""For lines without a style of their own, in turn."""


def line(name: str, points: Iterable[tuple[float, Spread | None]], look: Style) -> Line:
    """Return the line of means, with the seeds' range as its band; points without a value are left out."""
    found = [(x, value) for x, value in points if value is not None]
    return Line(name, [(x, v.mean) for x, v in found], look, [(v.min, v.max) for _, v in found])


def curve(name: str, one: Relearning, look: Style) -> Line:
    """Return a relearning curve over log(1 + step); its name tells of an attack that failed."""
    points = zip(map(math.log1p, one.steps), one.forget, strict=True)
    return line(name if one.attacked else f"{name} ({one.verdict})", points, look)


def plot(
    lines: Sequence[Line],
    title: str,
    *,
    x_label: str,
    ticks: Mapping[float, str],
    y_label: str = f"forget {LOSS}",
    ideal: float | None = None,
    level: float | None = None,
) -> Draw:
    """Return a function that draws lines.

    ``ticks`` maps places on the horizontal axis to labels; ``ideal`` is the highest loss of the perfect filter, and the plot
    ends not far above it, so that a broken model does not press all others flat; ``level`` is the height of a dotted line.
    """
    heights = [y for one in lines for _, y in one.points]
    top = math.inf if ideal is None or not heights else ideal + 0.4 * max(0.1, ideal - min(heights))

    def draw(axes: Axes, theme: Theme) -> None:
        draw_lines(axes, theme, lines=lines, top=top)
        if level is not None:
            axes.axhline(level, color=theme.text, linestyle=":", linewidth=1)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xticks(list(ticks), list(ticks.values()))

    return draw
