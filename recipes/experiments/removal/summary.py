"""The summary file of an experiment: what it holds is not made again, and rows that nobody asked for stay."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.removal.cells import LABELS, NUMBERS, Cell, Experiment
from experiments.report.reading import EXPERIMENT_FORMAT, read_experiment
from routed_peft import files
from routed_peft.demo.settings import DemoSettings
from routed_peft.runs.records import RUN

ATTACK_SETTINGS = {"attack_rates": None, "attack_steps": None, "extensions": None, "attack_split": "validation"}
"""What attacks depend on, and the value that is not part of a name, for what came later."""


def write_json(file: Path, content: Any) -> None:
    """Write all of ``content``, or none."""
    files.write_json(file, finite(content), indent=1, allow_nan=False)


def finite(content: Any) -> Any:
    """Return ``content`` with null for numbers that JSON does not have, such as the loss of an attack that diverged.

    >>> finite({"losses": [1.0, float("nan")]})
    {'losses': [1.0, None]}
    """
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def restore(experiment: Experiment, cells: list[Cell], place: Path) -> None:
    """Take the numbers of finished cells from the summary, where ``place`` lacks them: on another machine, say.

    A cell is taken whose key, that is all it depends on, is in the summary. Attacks are taken if they were made as the
    experiment asks; where one is missing, the cell's model is needed and the cell is made again.

    Raises:
        ValueError: the file is no summary of an experiment, or of another version of this library.
    """
    summary = _read_summary(experiment)
    # methods that make the same model share a cell; of their rows the one that was attacked most is the latest
    attacked_last = sorted(summary["cells"], key=lambda row: len(row.get("attacks", {})))
    rows = {row["key"]: row for row in attacked_last if "key" in row}
    same = not _attacked_otherwise(experiment, summary)
    for cell in cells:
        row, folder = rows.get(cell.key), place / cell.key
        if row is None:
            continue
        try:
            with FileLock(place / f"{cell.key}.lock", timeout=0):
                if not (folder / NUMBERS).exists():
                    about = ("method", "seed", *LABELS, "key", "attacks")
                    write_json(folder / RUN, {"versions": summary.get("versions", {})})
                    write_json(folder / NUMBERS, {key: value for key, value in row.items() if key not in about})
                here = json.loads((folder / NUMBERS).read_text())
                if not same or any(here[name] != row[name] for name in ("forget_loss", "retain_loss")):
                    continue  # made anew, for a cell that needed its model, and not the same to the last bit
                for name, curves in row["attacks"].items():
                    if not (file := attack_file(folder, name, experiment)).exists():
                        write_json(file, curves)
        except Timeout:  # another process is making it anew
            continue


def read(file: Path) -> Any:
    """Return what a file holds, or None where it is not there, or not any more: another process may make its cell anew."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None


def attack_file(folder: Path, name: str, experiment: Experiment) -> Path:
    """Return where the curves of an attack on a cell are kept."""
    settings = [value for key, plain in ATTACK_SETTINGS.items() if (value := getattr(experiment, key)) != plain]
    about = json.dumps([name, *settings])
    return folder / f"attack-{name}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.json"


def further_rows(experiment: Experiment, settings: DemoSettings, cells: list[Cell]) -> list[dict[str, Any]]:
    """Return the rows of the summary file that are not asked for, but would be made by the same settings.

    A sweep over some methods or seeds thus leaves the others where they are; what other settings made goes.

    Raises:
        ValueError: where these rows were attacked otherwise than the experiment asks.
    """
    summary = _read_summary(experiment)
    asked = {(cell.key, cell.shown) for cell in cells}
    rows = [row for row in summary["cells"] if (row.get("key"), row["method"]) not in asked and _of(row, settings)]
    odd = _attacked_otherwise(experiment, summary)
    if odd and any(row.get("attacks") for row in rows):
        name, then = next(iter(odd.items()))
        raise ValueError(
            f"`summary_file` {experiment.summary_file} holds {len(rows)} rows that are not asked for, with `{name}` {then} "
            f"where {getattr(experiment, name)} is asked for now: name another file, or ask for all of them"
        )
    return rows


def _read_summary(experiment: Experiment) -> Mapping[str, Any]:
    file = Path(experiment.summary_file)
    return read_experiment(file) if file.exists() else {"cells": [], "experiment": {}}


def _attacked_otherwise(experiment: Experiment, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of attacks that a summary has other values of than the experiment, with these values."""
    then = {name: summary["experiment"].get(name, plain) for name, plain in ATTACK_SETTINGS.items()}
    return {name: value for name, value in then.items() if value != getattr(experiment, name)}


def _of(row: Mapping[str, Any], settings: DemoSettings) -> bool:
    """Return whether an experiment with these settings would have made a row."""
    labels = {name: row[name] for name in LABELS if row[name] is not None}
    try:
        cell = Cell.of(row["method"], replace(settings, seed=row["seed"], **labels))
    except (KeyError, ValueError):  # a method that is not there any more
        return False
    return bool(cell.key == row.get("key"))


def write_summary(experiment: Experiment, settings: DemoSettings, cells: list[Cell], place: Path) -> None:
    """Write the numbers of all finished cells, and keep `further_rows` unless they are to be collected anew."""
    with FileLock(f"{place / Path(experiment.summary_file).name}.lock"):
        kept = [] if experiment.collect else further_rows(experiment, settings, cells)
        _write_summary(replace(experiment, collect=False), settings, cells, place, kept)


def _write_summary(
    experiment: Experiment, settings: DemoSettings, cells: list[Cell], place: Path, kept: list[dict[str, Any]]
) -> None:
    rows = []
    for cell in cells:
        file = place / cell.key / NUMBERS
        if (numbers := read(file)) is not None:
            labels = {name: cell.labels.get(name) for name in LABELS}
            files = {name: attack_file(file.parent, name, experiment) for name in experiment.attacks}
            attacks = {name: curves for name, path in files.items() if (curves := read(path)) is not None}
            about = {"method": cell.shown, "seed": cell.settings.seed, **labels}
            rows.append(about | numbers | {"key": cell.key, "attacks": attacks})
    summary = {
        "format": EXPERIMENT_FORMAT,
        "command": re.sub(r" --collect(=| )\w+", "", shlex.join(["python", *sys.argv])),
        "versions": versions_of(place / cell.key for cell in cells),
        "experiment": asdict(experiment),
        "settings": asdict(settings),
        "cells": rows + [_as_new(row, rows) for row in kept],
    }
    write_json(Path(experiment.summary_file), summary)


def _as_new(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return a row that was not asked for, with what is known now where another method's row has the same model.

    >>> _as_new({"method": "a", "key": "k", "attacks": {}}, [{"method": "b", "key": "k", "attacks": {"forget": 1}}])
    {'method': 'a', 'key': 'k', 'attacks': {'forget': 1}}
    """
    same = next((one for one in rows if one["key"] == row.get("key")), None)
    if same is None or len(same["attacks"]) < len(row["attacks"]):
        return row
    return dict(same) | {name: row[name] for name in ("method", "seed", *LABELS) if name in row}


def versions_of(folders: Iterable[Path]) -> dict[str, str]:
    """Return the versions of libraries that cells were trained with; where they differ, all of them."""
    found: dict[str, set[str]] = {}
    for file in (folder / RUN for folder in folders):
        for name, version in json.loads(file.read_text())["versions"].items() if file.exists() else ():
            found.setdefault(name, set()).add(version)
    return {name: " or ".join(sorted(versions)) for name, versions in found.items()}
