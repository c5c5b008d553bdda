"""README's figure, drawn from results/ for light and dark pages."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report.aggregate import Comparison, aggregate
from experiments.report.figures import figures
from experiments.tables.results import ROOT
from routed_peft.report.drawing import DARK, LIGHT, render

RESULT = ROOT / "results" / "biology.json"
METHODS = ("no_routing", "filter", "classifier_filter_balanced", "routed", "perfect_filter")
THEMES = {"light": LIGHT, "dark": DARK}


def file_of(theme: str) -> Path:
    """Return the file of the figure for one kind of page."""
    return ROOT / "docs" / "figures" / f"labels-{theme}.svg"


def mark() -> str:
    """Return the last line of a figure, which names its data. Drawing anew would depend on matplotlib's version."""
    return f"<!-- of {RESULT.name}, sha256 {hashlib.sha256(RESULT.read_bytes()).hexdigest()} -->\n"


def draw(theme: str) -> str:
    """Return the figure: forget loss over shares of labels, before an attack and after the worst."""
    report = json.loads(RESULT.read_text())
    found = aggregate(cell for cell in report["cells"] if cell["method"] in METHODS)
    whole = {condition: one for condition, one in found.results.items() if len(one.cells) == len(found.seeds)}
    found = Comparison(whole)  # conditions that lack a seed are not drawn
    (labels,) = (figure for figure in figures(found, report["settings"]) if figure.key == "labels")
    return render([panel.draw for panel in labels.panels], THEMES[theme]).decode() + mark()


def main(arguments: Sequence[str]) -> None:
    """Draw the figures; with ``--check`` look at their data only, and exit with a message where one is of other results."""
    for theme in THEMES:
        file = file_of(theme)
        if "--check" not in arguments:
            file.parent.mkdir(exist_ok=True)
            file.write_text(draw(theme), encoding="utf-8")
        elif not file.exists() or not file.read_text(encoding="utf-8").endswith(mark()):
            sys.exit(f"{file.name} was drawn from other results: run `python docs/figures.py`")
