"""All cells of an experiment, one after the other, continued where they were stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from routed_peft.demo.display import quiet
from routed_peft.demo.settings import DemoSettings
from routed_peft.evaluation.report.reading import EXPERIMENT_FORMAT, read_experiment
from routed_peft.experiment.cells import LABELS, NUMBERS, Cell, Experiment, all_cells
from routed_peft.experiment.making import attack, make
from routed_peft.training.records import RUN

ATTACK_SETTINGS = {"attack_rates": None, "attack_steps": None, "extensions": None, "attack_split": "validation"}
"""What attacks depend on, and the value that is not part of a name, for what came later."""


class Bar(TrainerCallback):
    """Shows the steps of one training run."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put up a bar."""
        self.task = self.progress.add_task("training", total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show a step."""
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.progress.remove_task(self.task)


def finish(cell: Cell, cells: Path, experiment: Experiment, progress: Progress, kept: bool = False) -> bool:
    """Make and attack a cell as far as that is not done; return False where another process is at it, or at its parent.

    Args:
        cell: which one.
        cells: directory of all cells.
        experiment: its attacks.
        progress: where bars are shown.
        kept: whether its model must be there as well, for a cell that is made from it.
    """
    folder, began = cells / cell.key, time.monotonic()
    if is_done(cell, folder, experiment) and not (kept and not has_model(cell, folder)):
        return True
    parent = cell.method.parent and Cell.of(cell.method.parent, cell.settings)
    if parent and not finish(parent, cells, replace(experiment, attacks=[]), progress, kept=True):
        return False
    source = cells / parent.key if parent else folder
    jobs: dict[Path, Callable[[], Any]] = {folder / NUMBERS: partial(make, cell, folder, source, Bar(progress))}
    for name in experiment.attacks:
        jobs[attack_file(folder, name, experiment)] = partial(attack, cell, folder, name, experiment)
    try:
        with FileLock(cells / f"{cell.key}.lock", timeout=0):
            if not has_model(cell, folder):
                shutil.rmtree(folder, ignore_errors=True)  # what an interruption left, or a summary without its model
            for file, job in jobs.items():
                if file.exists():
                    continue
                if file.name == NUMBERS:
                    shutil.rmtree(folder, ignore_errors=True)
                with quiet():
                    result = job()
                write_json(file, result)
                progress.console.print(f"{cell.key}: {file.stem}, {time.monotonic() - began:.0f} s")
    except Timeout:
        return False
    return True


def is_done(cell: Cell, folder: Path, experiment: Experiment) -> bool:
    """Return whether a cell was measured, and attacked as the experiment asks."""
    return all(
        file.exists()
        for file in (folder / NUMBERS, *(attack_file(folder, name, experiment) for name in experiment.attacks))
    )


def has_model(cell: Cell, folder: Path) -> bool:
    """Return whether a cell's finished model lies in its directory, and not its numbers alone."""
    return (folder / NUMBERS).exists() and (folder / cell.method.plain).is_dir()


def write_json(file: Path, content: Any) -> None:
    """Write ``content`` aside, then rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # of this process: all of them write the summary
    aside.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
    aside.rename(file)


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
    file = Path(experiment.summary_file)
    summary = read_experiment(file) if file.exists() else {"cells": [], "experiment": {}}
    rows = {row["key"]: row for row in summary["cells"] if "key" in row}
    then = {name: summary["experiment"].get(name, plain) for name, plain in ATTACK_SETTINGS.items()}
    same = then == {name: getattr(experiment, name) for name in ATTACK_SETTINGS}
    for cell in cells:
        row, folder = rows.get(cell.key), place / cell.key
        if row is None:
            continue
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


def write_summary(experiment: Experiment, settings: DemoSettings, cells: list[Cell], place: Path) -> None:
    """Write the numbers of all finished cells."""
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
        "cells": rows,
    }
    write_json(Path(experiment.summary_file), summary)


def versions_of(folders: Iterable[Path]) -> dict[str, str]:
    """Return the versions of libraries that cells were trained with; where they differ, all of them."""
    found: dict[str, set[str]] = {}
    for file in (folder / RUN for folder in folders):
        for name, version in json.loads(file.read_text())["versions"].items() if file.exists() else ():
            found.setdefault(name, set()).add(version)
    return {name: " or ".join(sorted(versions)) for name, versions in found.items()}


def run_experiment(experiment: Experiment, settings: DemoSettings) -> None:
    """Make and attack all cells that are not there yet, and write the summary after each.

    Cells whose numbers stand in the summary already are not made again, even if their directories are gone. Start it in as
    many processes as there is room for: a cell that one of them is at is left to it.

    Args:
        experiment: methods, shares of labels, seeds and attacks.
        settings: everything else.

    Raises:
        ValueError: on an unknown method or attack, and where the summary file is another or of another version; at the end,
            where cells failed, which ones and why.
    """
    cells, place = all_cells(experiment, settings), Path(experiment.cells_dir)
    place.mkdir(parents=True, exist_ok=True)
    restore(experiment, cells, place)
    if experiment.collect:
        write_summary(replace(experiment, collect=False), settings, cells, place)
        return
    failed: dict[str, str] = {}
    with Progress(console=Console()) as progress:
        task = progress.add_task(f"{settings.pair}: {len(cells)} cells", total=len(cells))
        todo = cells
        while todo:
            left = []
            for cell in todo:
                try:
                    done = finish(cell, place, experiment, progress)
                except ValueError as error:  # too few labels for the region to tell sides apart, say; the others go on
                    failed[f"{cell.shown}, {cell.key}"] = str(error)
                    progress.console.print(f"{cell.key}: failed: {error}", markup=False)
                    progress.advance(task)
                    continue
                if done:
                    write_summary(experiment, settings, cells, place)
                    progress.advance(task)
                else:
                    left.append(cell)
            if len(left) == len(todo):
                time.sleep(5)  # other processes are at the rest
            todo = left
    if failed:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise ValueError(
            f"{len(failed)} of {len(cells)} cells failed; the others are in {experiment.summary_file}:\n{reasons}"
        )
