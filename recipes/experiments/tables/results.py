"""Files of ``results/``, read for tables, and text that tables share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.report.numbers import ranged
from experiments.tables.absent import as_asked
from routed_peft.evaluation.measures import Spread

ROOT = Path(__file__).resolve().parents[3]
_FORMER_WORDS = {r"\bway\b": "removed", r"(?<!retain )\btax\b": "retain tax"}
"""Words that older files of results have for numbers -> those of today."""


def load(name: str) -> Any:
    """Return the content of ``results/NAME.json``, or None where there is none yet."""
    file = ROOT / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def load_experiment(name: str) -> Any:
    """Return a summary of `recipes/experiment.py` with the cells that its YAML asks for now; None where there is none yet."""
    report = load(name)
    return report and as_asked(report, ROOT / "recipes" / "configs" / f"experiment_{name}.yaml")


def mean_range(values: Sequence[float]) -> str:
    """Return mean and range over seeds; a dash where nothing was measured."""
    return ranged(Spread.from_values(values)) if values else "–"


def criteria(checks: list[dict[str, Any]]) -> str:
    """Return the sentence that counts the criteria that hold, and names the others."""
    held = sum(bool(check["holds"]) for check in checks)
    missed = [f"{check['name']} ({check['rule']})" for check in checks if not check["holds"]]
    names = "; ".join(missed) or "none"
    for former, word in _FORMER_WORDS.items():
        names = re.sub(former, word, names)
    return f"Of {len(checks)} criteria, {held} hold in every seed; missed or not measured: {names}."
