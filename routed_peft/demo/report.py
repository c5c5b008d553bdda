"""The page ``report.html``, which needs nothing else, and ``curves.png`` beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from routed_peft.demo.measuring import CHANCE
from routed_peft.demo.settings import ARMS, DemoSettings
from routed_peft.evaluation.measures import removed, retain_tax
from routed_peft.files import write_bytes
from routed_peft.report.drawing import LIGHT, Axes, Draw, Line, Style, Theme, draw_lines, render
from routed_peft.report.numbers import share
from routed_peft.report.page import environment, picture
from routed_peft.training import RunDirectory

Row = dict[str, Any]
ROWS = {
    "no_routing": "no routing",
    "placebo": "no routing, extra units removed",
    "filter": "filter, same labels",
    "routed_on": "routed, region on",
    "routed": "routed, region ablated",
    "perfect_filter": "perfect filter",
}

Point = Mapping[str, Any]
STYLES = {
    "no_routing": Style("grey"),
    "filter": Style("orange"),
    "routed": Style("blue"),
    "routed_on": Style("sky", "--"),
    "perfect_filter": Style("green"),
}
NAMES = {**ROWS, "routed": "routed, ablated"}
Panel = Callable[[Sequence[Point], Mapping[str, Any]], Draw]
"""Makes a drawing of the points and the summary of a run."""

TEMPLATE = "demo.html.jinja"
CAPTIONS = {
    "forget": "Validation loss on biology while training.",
    "retain": "Validation loss on other text while training.",
    "relearning": "Loss on biology test text while an attacker finetunes the plain checkpoint; the worst case over "
    "learning rates and earlier steps.",
    "ablation": "Test loss of one and the same run with its region and without it. Lines: no routing and perfect filter.",
}


def write_report(records: RunDirectory, summary: Mapping[str, Any], *, settings: DemoSettings, file: Path) -> None:
    """Draw ``curves.png`` beside ``file``, then write the page aside and rename it; ``summary`` is that of `run_demo`."""
    points = records.points()
    drawn = {name: panel(points, summary) for name, panel in PANELS.items()}
    write_bytes(file.with_name("curves.png"), render(list(drawn.values()), LIGHT, format="png"))
    images = {name: picture([draw], CAPTIONS[name]) for name, draw in drawn.items()}
    page = environment().get_template(TEMPLATE)
    content = page.render(
        summary=summary,
        models=summary["models"],
        rows=ROWS,
        arms=ARMS,
        settings=settings,
        about=json.loads((records.path / "run.json").read_text(encoding="utf-8")),
        images=images,
        chance=CHANCE,
        last=str(settings.relearn_steps[-1]),
        out=file.parent,
    )
    write_bytes(file, content.encode())


def training_curves(split: str, title: str) -> Panel:
    """Return the panel of validation losses of one side during training."""

    def panel(points: Sequence[Point], summary: Mapping[str, Any]) -> Draw:
        lines: dict[str, list[tuple[float, float]]] = {}
        for key in STYLES:
            wanted = ("training", split, key.removesuffix("_on"), key == "routed")
            chosen = (p for p in points if (p["phase"], p["split"], p["arm"], p.get("ablated")) == wanted)
            lines[key] = [(point["tokens"] / 1e6, point["loss"]) for point in chosen]
        return partial(_draw_lines, lines, words={"title": title, "xlabel": "training tokens (millions)"})

    return panel


def relearning_curves(points: Sequence[Point], summary: Mapping[str, Any]) -> Draw:
    """Return the panel of the forget loss under attack, in the worst case over learning rates."""
    curves = {key: summary["models"][key].get("relearned") for key in STYLES}
    lines = {key: sorted((int(step), loss) for step, loss in curve.items()) for key, curve in curves.items() if curve}
    return partial(
        _draw_lines, lines, words={"title": "Biology, relearned from a few documents", "xlabel": "steps of the attack"}
    )


def _draw_lines(lines: Mapping[str, Any], *panel: Any, words: Mapping[str, str]) -> None:
    axes, theme = panel
    draw_lines(axes, theme, lines=[Line(NAMES[key], line, STYLES[key]) for key, line in lines.items()])
    axes.set(ylabel="loss (nats per token)", **words)


def _before_and_after(models: Mapping[str, Any], axes: Axes, theme: Theme) -> None:
    """Draw the routed model with its region and without, between no routing and the perfect filter."""
    sides = {"forget": "biology", "retain": "other text"}
    for y, (key, place) in enumerate((key, row) for row, _ in enumerate(sides) for key in ("routed_on", "routed")):
        side = list(sides)[place]
        loss, height = models[key][f"{side}_loss"], -y - 0.6 * place
        axes.barh(height, loss, 0.8, color=theme.colors[STYLES[key].color])
        inside = f"{'with region' if key == 'routed_on' else 'ablated'} {loss:.2f}"
        axes.text(0.08, height, inside, va="center", color=theme.background, fontweight="bold")
    for place, side in enumerate(sides):
        low, high = -2.6 * place - 1.5, -2.6 * place + 0.5
        for key in ("no_routing", "perfect_filter"):
            loss, color = models[key][f"{side}_loss"], theme.colors[STYLES[key].color]
            axes.plot([loss, loss], [low, high], color=color, linewidth=2.5)
            if not place:
                axes.text(loss, high + 0.08, f"{NAMES[key]} ", ha="center", color=color)
    title = "The routed model, before and after"
    axes.set(title=title, xlabel="loss (nats per token)", yticks=[-0.5, -3.1], ylim=(-4.4, 1.1))
    axes.set_yticklabels(sides.values())
    axes.grid(axis="y", visible=False)


PANELS: dict[str, Panel] = {
    "forget": training_curves("forget", "Biology: should stay high"),
    "retain": training_curves("retain", "Other text: should go low"),
    "relearning": relearning_curves,
    "ablation": lambda points, summary: partial(_before_and_after, summary["models"]),
}


def derive(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the removal of the routed arm and of the filter with the same labels, before and after relearning, and its taxes.

    ``models`` maps the keys of `ROWS` to numbers: ``forget_loss``, ``retain_loss``, ``relearned`` (step -> forget loss), …
    """

    def share_removed(key: str, step: int | None = None) -> float:
        arms = (models[arm] for arm in (key, "no_routing", "perfect_filter"))
        return removed(*(arm["forget_loss"] if step is None else arm["relearned"][step] for arm in arms))

    attacked = [step for step in models["routed"]["relearned"] if step]
    return {
        "removed": share_removed("routed"),
        "retain_tax": retain_tax(models["routed"]["retain_loss"], models["perfect_filter"]["retain_loss"]),
        "retain_tax_same_labels": retain_tax(models["routed"]["retain_loss"], models["filter"]["retain_loss"]),
        "removed_relearned": {step: share_removed("routed", step) for step in attacked},
        "removed_by_filter": share_removed("filter"),
        "removed_by_filter_relearned": {step: share_removed("filter", step) for step in attacked},
    }


def verdict(derived: Mapping[str, Any]) -> str:
    """Return the result in one sentence.

    >>> verdict({"removed": 0.75, "removed_by_filter": 0.08, "retain_tax_same_labels": 0.104})
    'With half of the labels missing, routing and ablating removed 75 % of what training on biology had taught (filtering by
    the same labels: 8 %), and cost 0.10 nats per token of other text against that filter.'
    """
    cost = derived["retain_tax_same_labels"]
    price = f"cost {cost:.2f}" if cost >= 0 else f"gained {-cost:.2f}"
    if math.isnan(derived["removed"]):
        return ("Too little was learned to tell: the perfect filter's loss on biology is not above that without routing, so "
                f"nothing can be removed. Routing and ablating {price} nats per token of other text.")  # fmt: skip
    return (
        f"With half of the labels missing, routing and ablating removed {share(derived['removed'])} of what training on "
        f"biology had taught (filtering by the same labels: {share(derived['removed_by_filter'])}), and {price} nats per "
        "token of other text against that filter."
    )


def terminal_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table for the terminal: four models and three losses."""
    last = max(models["routed"]["relearned"])
    table = Table(title="held-out loss, nats per token", caption="high on biology and low on the rest is the aim")
    table.add_column("")
    for name in ("biology", f"… after {last} relearning steps", "other text"):
        table.add_column(name, justify="right")
    for key in ("no_routing", "filter", "routed", "perfect_filter"):
        numbers = models[key]
        cells = (numbers["forget_loss"], numbers["relearned"][last], numbers["retain_loss"])
        table.add_row(ROWS[key], *(f"{cell:.2f}" for cell in cells), style="bold" if key == "routed" else None)
    return table
