"""Points in a plane, each with its spread and with its name beside it where there is room."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from routed_peft.evaluation.measures import Spread
from routed_peft.report.drawing import Style, Theme

_WIDTH, _HEIGHT = 335.0, 205.0  # points, of a panel's axes: what matters is which names overlap
_LETTER, _LINE = 5.0, 11.0
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
Box = tuple[float, float, float, float]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A point with its spread over seeds."""

    name: str
    x: Spread
    y: Spread
    style: Style


def draw_marks(axes: Axes, theme: Theme, *, marks: Sequence[Mark], x_limits: Limits, y_limits: Limits) -> None:
    """Draw marks with a cross from the lowest to the highest seed; those beyond the limits at the edge, with their value."""
    axes.set(xlim=x_limits, ylim=y_limits)
    names, places, spots, bars = [], [], [], []
    for mark in marks:
        color = theme.colors[mark.style.color]
        place = min(mark.x.mean, x_limits[1]), min(mark.y.mean, y_limits[1])
        axes.plot([mark.x.min, mark.x.max], [mark.y.mean] * 2, color=color, linewidth=1.2)
        axes.plot([mark.x.mean] * 2, [mark.y.min, mark.y.max], color=color, linewidth=1.2)
        axes.plot(*place, mark.style.marker, color=color, markersize=6.5, clip_on=False)
        up = f" ↑ {mark.y.mean:.1f}" if mark.y.mean > y_limits[1] else ""
        right = f" → {mark.x.mean:.1f}" if mark.x.mean > x_limits[1] else ""
        names.append(mark.name + up + right)
        places.append(place)
        x, y = _scaled(place[0], x_limits, _WIDTH), _scaled(place[1], y_limits, _HEIGHT)
        spots.append((x, y))
        bars.append(
            (_scaled(mark.x.min, x_limits, _WIDTH) - 2, y - 2, _scaled(mark.x.max, x_limits, _WIDTH) + 2, y + 2)
        )
        bars.append(
            (x - 2, _scaled(mark.y.min, y_limits, _HEIGHT) - 2, x + 2, _scaled(mark.y.max, y_limits, _HEIGHT) + 2)
        )
    for mark, name, place, (dx, dy) in zip(marks, names, places, offsets(spots, names, bars), strict=True):
        color = theme.colors[mark.style.color]
        far = abs(dx) > 0.7 * _LETTER * len(name) + 12 or abs(dy) > 1.5 * _LINE
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3} if far else None
        centered: dict[str, Any] = {"ha": "center", "va": "center", "annotation_clip": False, "arrowprops": leader}
        axes.annotate(name, place, xytext=(dx, dy), textcoords="offset points", color=color, **centered)


def offsets(
    spots: Sequence[tuple[float, float]], names: Sequence[str], taken: Iterable[Box] = ()
) -> list[tuple[float, float]]:
    """Return the place of the middle of every name, seen from its spot: the nearest one where it covers least.

    Args:
        spots: in points, from the lower left corner of the axes.
        names: one for each.
        taken: what else is not to be covered: left, lower, right and upper end.

    Example:
        >>> offsets([(50.0, 50.0)], ["abcd"])  # to the right
        [(17.0, 0.0)]
    """
    covered = [*taken, *((x - 4, y - 4, x + 4, y + 4) for x, y in spots)]
    found = []
    for (x, y), name in zip(spots, names, strict=True):
        half = _LETTER * len(name) / 2
        choices = []
        for ring, (right, up) in itertools.product(range(6), _SIDES):
            dx = right * (half + 7 + 6 * ring) if not up else right * 0.8 * (half + 7)
            dy = up * _LINE * (1 + 0.7 * ring)
            box = (x + dx - half, y + dy - _LINE / 2, x + dx + half, y + dy + _LINE / 2)
            outside = max(0.0, -box[0]) + max(0.0, box[2] - _WIDTH) + max(0.0, -box[1]) + max(0.0, box[3] - _HEIGHT)
            choices.append((sum(_overlap(box, other) for other in covered) + 10 * outside, dx, dy, box))
        _, dx, dy, box = min(choices, key=lambda choice: round(choice[0], 6))
        found.append((dx, dy))
        covered.append(box)
    return found


def _scaled(value: float, limits: Limits, size: float) -> float:
    return (value - limits[0]) / (limits[1] - limits[0]) * size


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
