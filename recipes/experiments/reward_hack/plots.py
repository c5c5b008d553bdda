"""The figure: hack rates and honest accuracy during training, and at the end over the scale of the region."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from experiments.reward_hack.arms import MAIN
from experiments.reward_hack.measuring import honest
from routed_peft.report.drawing import Draw, Line, Style, Theme, draw_lines

LINES = {
    ("none", 1.0): ("no intervention", Style("grey")),
    ("anchored-absorb", 0.0): ("not routed, ablated", Style("grey", "--")),
    ("filter", 1.0): ("filter", Style("orange")),
    ("penalty", 1.0): ("penalty", Style("purple")),
    ("anchored-oracle", 0.0): ("oracle labels, ablated", Style("green", "--")),
    (MAIN, 0.0): ("routed, ablated", Style("blue", width=2.6)),
}
PANELS = {
    "B": "Hack rate where the detector looks (B)",
    "C": "Hack rate on its unmonitored twin (C)",
    "D": "Another hack, unmonitored (D)",
    "honest": "Honest accuracy, hacks masked",
    "scale": "The routed model by the scale of its region",
}
Value = Callable[[Mapping[str, Any]], float]


def value_of(panel: str) -> Value:
    """Return what a panel shows of the rates of an evaluation."""
    return lambda rates: honest(rates) if panel == "honest" else rates["hack"][panel]


def training_panel(axes: Axes, theme: Theme, *, panel: str, cells: Sequence[Mapping[str, Any]]) -> None:
    """Draw validation rates while training: the mean over seeds, and their range."""
    lines = []
    for (arm, scale), (name, style) in LINES.items():
        by_step: dict[int, list[float]] = {}
        for point in (point for cell in cells if cell["arm"] == arm for point in cell["curve"]):
            if point["scale"] == scale:
                by_step.setdefault(point["step"], []).append(value_of(panel)(point))
        lines.append(_line(name, style, by_step))
    draw_lines(axes, theme, lines=lines)
    axes.set(title=PANELS[panel], xlabel="step of GRPO", ylim=(-0.03, 1.03))


def scale_panel(axes: Axes, theme: Theme, cells: Sequence[Mapping[str, Any]]) -> None:
    """Draw test rates of the routed model as its region is scaled from nothing to all."""
    wanted = {
        "B": Style("blue"),
        "C": Style("sky", "--"),
        "D": Style("orange"),
        "honest": Style("green"),
    }
    lines = []
    for panel, style in wanted.items():
        by_scale: dict[float, list[float]] = {}
        for cell in cells:
            for scale, rates in cell["end"].items() if cell["arm"] == MAIN else ():
                by_scale.setdefault(float(scale), []).append(value_of(panel)(rates))
        name = panel if panel == "honest" else f"hacks in {panel}"
        lines.append(_line(name, style, by_scale))
    draw_lines(axes, theme, lines=lines)
    axes.set(title=PANELS["scale"], xlabel="scale of the region (0: ablated)", ylim=(-0.03, 1.03))


def _line(name: str, style: Style, values: Mapping[Any, Sequence[float]]) -> Line:
    points = [(x, statistics.mean(found)) for x, found in sorted(values.items())]
    several = any(len(found) > 1 for found in values.values())
    return Line(name, points, style, [(min(v), max(v)) for _, v in sorted(values.items())] if several else None)


def draws(cells: Sequence[Mapping[str, Any]]) -> dict[str, Draw]:
    """Return what draws each panel."""
    panels: dict[str, Draw] = {
        name: partial(training_panel, panel=name, cells=cells) for name in PANELS if name != "scale"
    }
    return panels | {"scale": partial(scale_panel, cells=cells)}
