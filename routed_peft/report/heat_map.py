"""Heat map of losses: subsets of regions down, topics across."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from routed_peft.evaluation.subsets import SubsetLosses, subset_labels
from routed_peft.files import write_bytes
from routed_peft.report.drawing import LIGHT, LOSS, Theme, render


def draw_subsets(losses: SubsetLosses, path: Path) -> None:
    """Draw `subset_losses` into a PNG or SVG file, named by the ending of ``path``."""
    topics = list(next(iter(losses.values())))
    values = [[row[topic].loss for topic in topics] for row in losses.values()]
    labels = subset_labels(losses)
    low, high = min(map(min, values)), max(map(max, values))

    def draw(axes: Axes, theme: Theme) -> None:
        image = axes.imshow(values, cmap="Blues", aspect="auto", vmin=low, vmax=max(high, low + 1e-9))
        tilt = 30 if max(map(len, topics)) > 10 else 0
        axes.set_xticks(range(len(topics)), topics, rotation=tilt, ha="right" if tilt else "center")
        axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="topic of the text", ylabel="regions on")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                dark = value - low > 0.55 * (high - low)
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="#ffffff" if dark else theme.text)
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label=LOSS).outline.set_visible(False)

    size = (2.4 + 0.075 * max(map(len, labels)) + 0.85 * len(topics), 1.5 + 0.36 * len(labels))
    write_bytes(path, render([draw], LIGHT, format=path.suffix[1:], size=size))
