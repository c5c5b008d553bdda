"""Colors for light and dark pages, lines with names at their ends, and figures of one or several panels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routed_peft.evaluation.measures import Spread
from routed_peft.report.attacks import Relearning

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy
except ImportError as error:
    raise ImportError('figures are drawn with matplotlib: pip install "routed_peft[report]"') from error


@dataclass(frozen=True)
class Theme:
    """Colors of a page and of what is drawn on it, told apart by color-blind readers too."""

    background: str
    text: str
    grid: str
    colors: Mapping[str, str]

    def rc(self) -> Any:
        """Return matplotlib's settings."""
        background = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), self.background)
        text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), self.text)
        grid = dict.fromkeys(("axes.edgecolor", "grid.color"), self.grid)
        return {**background, **text, **grid, **_RC}


_RC = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "font.size": 9.5,
    "lines.linewidth": 2,
    "svg.hashsalt": "routed_peft",
}


def _hues(*values: str) -> dict[str, str]:
    return dict(zip(("grey", "orange", "blue", "sky", "green", "purple"), values, strict=True))


_ON_LIGHT = _hues("#6e7781", "#c9650a", "#1f6fd0", "#4a86cf", "#1b8a5a", "#a03fb5")
_ON_DARK = _hues("#9aa4af", "#f0994a", "#6cb1ff", "#5590d6", "#4cc38a", "#d58be6")
LIGHT = Theme("#ffffff", "#24292f", "#d8dee4", _ON_LIGHT)
DARK = Theme("#161b22", "#d8dee6", "#343c46", _ON_DARK)
Draw = Callable[[Axes, Theme], None]


@dataclass(frozen=True)
class Style:
    """Look of one thing: a key of `Theme.colors`, matplotlib's dashes and marker, and the width of its line."""

    color: str
    dashes: str = "-"
    marker: str = "o"
    width: float = 2.0


LOSS = "loss (nats per token)"
OTHERS = tuple(
    Style(color, dashes) for dashes in ("-", "--", ":") for color in ("blue", "orange", "green", "purple", "grey")
)
"""For lines without a style of their own, in turn."""


@dataclass(frozen=True)
class Line:
    """A line with a name at its end."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Style
    band: Sequence[tuple[float, float]] | None = None  # lowest and highest y at every point


def render(
    draws: Sequence[Draw], theme: Theme, *, format: str = "svg", size: tuple[float, float] = (5.6, 3.7)
) -> bytes:
    """Return a figure of panels, two abreast, each by one function and of one size in inches; as "svg" or "png"."""
    columns, rows = min(2, len(draws)), math.ceil(len(draws) / 2)
    with rc_context(theme.rc()):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        for place, draw in enumerate(draws, 1):
            draw(figure.add_subplot(rows, columns, place), theme)
        buffer = io.BytesIO()
        options: dict[str, Any] = {"dpi": 150} if format == "png" else {"metadata": {"Date": None}}
        figure.savefig(buffer, format=format, **options)
    return buffer.getvalue()


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


def draw_lines(axes: Axes, theme: Theme, *, lines: Sequence[Line], gap: float = 0.075, top: float = math.inf) -> None:
    """Draw lines and name each at its end, names pushed apart where ends are close.

    ``gap`` is the least distance of two names, as a share of the height, and ``top`` the upper end of the plot; a line that
    ends above is named there, with its value. Lines without points are left out.
    """
    lines = [line for line in lines if line.points]
    for line in lines:
        color = theme.colors[line.style.color]
        xs, ys = zip(*line.points, strict=True)
        if line.band is not None:
            least, most = zip(*line.band, strict=True)
            axes.fill_between(xs, least, most, color=color, alpha=0.15, linewidth=0)
        look: dict[str, Any] = {"linestyle": line.style.dashes, "marker": line.style.marker}
        axes.plot(xs, ys, color=color, markersize=3.5, linewidth=line.style.width, **look)
    axes.set_ylim(top=min(top, axes.get_ylim()[1]))
    low, high = axes.get_ylim()
    ends = [line.points[-1] for line in lines]
    gap *= high - low
    heights = within(spread([min(y, high) for _, y in ends], gap), low=low, high=high, gap=gap)
    last = max((x for x, _ in ends), default=0.0)
    for i, (x, y) in enumerate(ends):
        if x < last:  # its name stands among the others' lines
            others = [_along(line.points, x) for line in lines if line is not lines[i]]
            heights[i] = clear_of(min(y, high), [*others, *heights[:i]], low=low, high=high, gap=gap)
    beside = offset_copy(axes.transData, fig=axes.get_figure(root=True), x=12, units="points")
    for line, (x, y), height in zip(lines, ends, heights, strict=True):
        color = theme.colors[line.style.color]
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        name, end = line.name if y <= high else f"{line.name} ↑ {y:.1f}", min(y, high)
        look = {"color": color, "va": "center", "annotation_clip": False}
        arrow = leader if abs(height - end) > gap / 3 else None
        axes.annotate(name, (x, end), (x, height), textcoords=beside, arrowprops=arrow, **look)


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the height of a line beside ``x``: of its first point to the right, or of its last one."""
    return next((y for there, y in points if there > x), points[-1][1])


def clear_of(value: float, taken: Sequence[float], *, low: float, high: float, gap: float) -> float:
    """Return the place nearest to a value that is ``gap`` from all taken ones, lower ones first; the value if there is none.

    >>> clear_of(1.0, [1.0, 1.5], low=0.0, high=4.0, gap=0.5), clear_of(1.0, [1.0, 0.5], low=0.0, high=4.0, gap=0.5)
    (0.5, 1.5)
    """
    places = (value + sign * i * gap / 2 for i in range(1 + round(2 * (high - low) / gap)) for sign in (-1, 1))
    free = (p for p in places if low <= p <= high and all(abs(p - other) >= gap * (1 - 1e-9) for other in taken))
    return next(free, value)


def within(values: Sequence[float], *, low: float, high: float, gap: float) -> list[float]:
    """Move values, ``gap`` apart already, to between two limits; where there is no room for all, the lower one gives way.

    >>> within([0.5, 0.0, 9.0], low=0.2, high=8.5, gap=0.5)
    [0.7, 0.2, 8.5]
    """
    placed = dict(enumerate(values))
    order = sorted(placed, key=placed.__getitem__)
    for rank, index in enumerate(order):
        placed[index] = max(placed[index], low + gap * rank)
    for rank, index in enumerate(reversed(order)):
        placed[index] = min(placed[index], high - gap * rank)
    return [placed[index] for index in range(len(values))]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move values as little as necessary for neighbors to be ``gap`` apart.

    >>> spread([1.0, 3.0, 1.0], 0.5)
    [0.75, 3.0, 1.25]
    """
    clusters: list[list[int]] = []
    placed: dict[int, float] = {}
    for index in sorted(range(len(values)), key=values.__getitem__):
        clusters.append([index])
        while True:
            members = clusters[-1]
            middle = sum(values[i] for i in members) / len(members)
            for rank, i in enumerate(members):
                placed[i] = middle + gap * (rank - (len(members) - 1) / 2)
            if len(clusters) < 2 or placed[members[0]] - placed[clusters[-2][-1]] >= gap - 1e-12:
                break
            clusters[-2:] = [clusters[-2] + members]
    return [placed[i] for i in range(len(values))]
