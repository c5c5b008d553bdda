"""Draw README's figure from results/, for light and dark pages: `python docs/figures.py`; `--check` asks if that was done."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from experiments.report.aggregate import Comparison, aggregate
from experiments.report.figures import figures
from routed_peft.report.drawing import DARK, LIGHT, render

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "biology.json"
METHODS = ("no_routing", "filter", "classifier_filter_balanced", "routed", "perfect_filter")
THEMES = {"light": LIGHT, "dark": DARK}


def drawn(theme: str) -> Path:
    """Return where the figure for one kind of page is."""
    return ROOT / "docs" / "figures" / f"labels-{theme}.svg"


def mark() -> str:
    """Return the last line of a figure: what it was drawn from. Drawing anew would depend on matplotlib's version."""
    return f"<!-- of {RESULT.name}, sha256 {hashlib.sha256(RESULT.read_bytes()).hexdigest()} -->\n"


def draw(theme: str) -> str:
    """Return the figure: forget loss over shares of labels, before an attack and after the worst."""
    report = json.loads(RESULT.read_text())
    found = aggregate(cell for cell in report["cells"] if cell["method"] in METHODS)
    whole = {condition: one for condition, one in found.results.items() if len(one.cells) == len(found.seeds)}
    found = Comparison(whole)  # what is still being made is not drawn
    (labels,) = (figure for figure in figures(found, report["settings"]) if figure.key == "labels")
    return render([panel.draw for panel in labels.panels], THEMES[theme]).decode() + mark()


if __name__ == "__main__":
    for theme in THEMES:
        file = drawn(theme)
        if "--check" not in sys.argv[1:]:
            file.parent.mkdir(exist_ok=True)
            file.write_text(draw(theme), encoding="utf-8")
        elif not file.exists() or not file.read_text(encoding="utf-8").endswith(mark()):
            sys.exit(f"{file.name} was drawn from other results: run `python docs/figures.py`")
