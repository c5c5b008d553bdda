"""The demo's figures, drawn from ``metrics.jsonl`` and the summary, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from routed_peft.demo.summary import ROWS

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours of a page and of the models on it, told apart by colour-blind readers too."""

    background: str
    text: str
    grid: str
    colors: Mapping[str, str]

    def rc(self) -> Any:
        """Return matplotlib's settings."""
        return {
            "figure.facecolor": self.background,
            "axes.facecolor": self.background,
            "savefig.facecolor": self.background,
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "axes.edgecolor": self.grid,
            "xtick.color": self.text,
            "ytick.color": self.text,
            "grid.color": self.grid,
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
            "svg.hashsalt": "demo",
        }


_BLUE, _ORANGE, _GREEN = "#1f6fd0", "#c9650a", "#1b8a5a"
LIGHT = Theme(
    "#ffffff",
    "#24292f",
    "#d8dee4",
    {"no_routing": "#6e7781", "filter": _ORANGE, "routed": _BLUE, "routed_on": "#5a94da", "perfect_filter": _GREEN},
)
DARK = Theme(
    "#161b22",
    "#d8dee6",
    "#343c46",
    {
        "no_routing": "#9aa4af",
        "filter": "#f0994a",
        "routed": "#6cb1ff",
        "routed_on": "#3f75b5",
        "perfect_filter": "#4cc38a",
    },
)
NAMES = {**ROWS, "routed": "routed, ablated"}
Panel = Callable[[Axes, Theme, Sequence[Point], Mapping[str, Any]], None]


def training_curves(split: str, title: str) -> Panel:
    """Return the panel of validation losses of one side during training."""

    def draw(axes: Axes, theme: Theme, points: Sequence[Point], summary: Mapping[str, Any]) -> None:
        lines = {}
        for key in theme.colors:
            arm, ablated = ("routed", False) if key == "routed_on" else (key, key == "routed")
            found = [
                (point["tokens"] / 1e6, point["loss"])
                for point in points
                if (point["phase"], point["split"], point["arm"], point.get("ablated"))
                == ("training", split, arm, ablated)
            ]
            lines[key] = found
        _lines(axes, theme, lines)
        axes.set(title=title, xlabel="training tokens (millions)", ylabel="loss (nats per token)")

    return draw


def relearning_curves(axes: Axes, theme: Theme, points: Sequence[Point], summary: Mapping[str, Any]) -> None:
    """Draw the forget loss under attack, in the worst case over learning rates."""
    curves = {key: summary["models"][key].get("relearned") for key in theme.colors}
    _lines(axes, theme, {key: sorted((int(s), loss) for s, loss in c.items()) for key, c in curves.items() if c})
    axes.set(
        title="Biology, relearnt from a few documents", xlabel="steps of the attack", ylabel="loss (nats per token)"
    )


def before_and_after(axes: Axes, theme: Theme, points: Sequence[Point], summary: Mapping[str, Any]) -> None:
    """Draw the routed model with its region and without, between the model that knows and the one that never saw."""
    models = summary["models"]
    sides = {"forget": "biology", "retain": "other text"}
    for y, (key, place) in enumerate((key, row) for row, _ in enumerate(sides) for key in ("routed_on", "routed")):
        side = list(sides)[place]
        loss, height = models[key][f"{side}_loss"], -y - 0.6 * place
        axes.barh(height, loss, 0.8, color=theme.colors[key])
        inside = f"{'with region' if key == 'routed_on' else 'ablated'} {loss:.2f}"
        axes.text(0.08, height, inside, va="center", color=theme.background, fontweight="bold")
    for place, side in enumerate(sides):
        low, high = -2.6 * place - 1.5, -2.6 * place + 0.5
        for key in ("no_routing", "perfect_filter"):
            axes.plot([models[key][f"{side}_loss"]] * 2, [low, high], color=theme.colors[key], linewidth=2.5)
            if not place:
                over = f"{NAMES[key]} "
                axes.text(models[key][f"{side}_loss"], high + 0.08, over, ha="center", color=theme.colors[key])
    axes.set(
        title="The routed model, before and after",
        xlabel="loss (nats per token)",
        yticks=[-0.5, -3.1],
        ylim=(-4.4, 1.1),
    )
    axes.set_yticklabels(sides.values())
    axes.grid(axis="y", visible=False)


PANELS: dict[str, Panel] = {
    "forget": training_curves("forget", "Biology: should stay high"),
    "retain": training_curves("retain", "Other text: should go low"),
    "relearning": relearning_curves,
    "ablation": before_and_after,
}


def render(
    names: Iterable[str], theme: Theme, points: Sequence[Point], summary: Mapping[str, Any], format: str = "svg"
) -> bytes:
    """Return a figure of the panels named, two abreast, as SVG or PNG."""
    names = list(names)
    rows = (len(names) + 1) // 2
    with rc_context(theme.rc()):
        figure = Figure(figsize=(5.6 * min(2, len(names)), 3.7 * rows), layout="constrained")
        for place, name in enumerate(names, 1):
            PANELS[name](figure.add_subplot(rows, min(2, len(names)), place), theme, points, summary)
        buffer = io.BytesIO()
        options: dict[str, Any] = {"dpi": 150} if format == "png" else {"metadata": {"Date": None}}
        figure.savefig(buffer, format=format, **options)
    return buffer.getvalue()


def _lines(axes: Axes, theme: Theme, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw lines and name each at its end, names pushed apart where ends are close."""
    lines = {key: line for key, line in lines.items() if line}
    for key, line in lines.items():
        dashes = "--" if key == "routed_on" else "-"
        axes.plot(*zip(*line, strict=True), dashes, color=theme.colors[key], marker="o", markersize=3.5)
    low, high = axes.get_ylim()
    heights = spread([line[-1][1] for line in lines.values()], (high - low) * 0.075)
    for (key, line), height in zip(lines.items(), heights, strict=True):
        axes.annotate(
            NAMES[key],
            (line[-1][0], height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=theme.colors[key],
            annotation_clip=False,
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move values as little as need be for neighbours to be ``gap`` apart.

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
