"""Summaries of experiments, read and checked, beside those of attacked checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routed_peft.report.reading import ATTACKED, Source, SummaryKind, is_experiment, load_json
from routed_peft.report.reading import read_sources as read_sources_of

EXPERIMENT_FORMAT = 1
_CELL = ("method", "seed", "labeled", "recall", "precision", "forget_loss", "retain_loss")
_CURVE = ("learning_rate", "status", "steps", "forget_losses", "retain_losses")


def read_sources(places: Sequence[str | Path]) -> list[Source]:
    """Read summaries of experiments and of attacked checkpoints.

    Args:
        places: files and directories, as `routed_peft.report.reading.read_sources` takes them.

    Raises:
        ValueError: what that function raises.
    """
    return read_sources_of(places, (EXPERIMENT, ATTACKED))


def read_experiment(file: Path) -> dict[str, Any]:
    """Read the summary of an experiment that may not be finished; its cells are not checked.

    Raises:
        ValueError: it is of something else, or of another version of this library.
    """
    content = load_json(file)
    if not is_experiment(content):
        raise ValueError(f"{str(file)!r} is no summary of an experiment: name another file, or move it away")
    _check_format(content, file)
    return dict(content)


def _check_format(content: Mapping[str, Any], file: Path) -> None:
    if content.get("format") != EXPERIMENT_FORMAT:
        raise ValueError(
            f"{str(file)!r} has the format {content.get('format')!r}, this version of routed_peft reads "
            f"{EXPERIMENT_FORMAT}: move it away and run recipes/experiment.py again (finished cells are kept)"
        )


def _read_checked(file: Path) -> dict[str, Any]:
    content = read_experiment(file)
    if not content["cells"]:
        raise ValueError(f"{str(file)!r} has no finished cell yet: wait for the first, or name another file")
    seen = set()
    for number, cell in enumerate(content["cells"], 1):
        where = f"cell {number} of {str(file)!r}"
        if missing := [key for key in _CELL if key not in cell]:
            raise ValueError(f"{where} lacks {', '.join(missing)}: was the file changed by hand?")
        for key in ("forget_loss", "retain_loss"):
            if not isinstance(cell[key], int | float) or not math.isfinite(cell[key]):
                raise ValueError(f"{where} has the `{key}` {cell[key]!r}: a loss must be a finite number")
        identity = tuple(cell[key] for key in _CELL[:5])
        if identity in seen:
            raise ValueError(f"{where} repeats an earlier cell, {dict(zip(_CELL, identity, strict=False))}")
        seen.add(identity)
        for attack, curves in cell.get("attacks", {}).items():
            if not curves or any(key not in curve for curve in curves for key in _CURVE):
                raise ValueError(f"the attack {attack!r} of {where} needs curves with {', '.join(_CURVE)}")
    return content


EXPERIMENT = SummaryKind(
    "an experiment", "recipes/experiment.py writes one to its `summary_file`", is_experiment, _read_checked
)
