"""The experiment *removal*, run: its cells made and attacked, or those that are there collected."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common.cells import Cell, CellStore
from experiments.common.engine import Design, Row, SummaryFile, run_cells
from experiments.removal.cells import DEFAULTS, LABELS, Experiment, MethodCell, all_cells
from experiments.removal.settings import Settings
from experiments.removal.train_cell import attack, check_attacks, make
from experiments.report.reading import EXPERIMENT_FORMAT, read_experiment
from routed_peft.runs.records import RUN

ATTACK_SETTINGS = ("attack_rates", "attack_steps", "extensions", "attack_split")
"""Fields of `Experiment` that attacks depend on."""


class Removal(Design):
    """Cells of the experiment, and their summary.

    Args:
        experiment: methods, shares of labels, seeds and attacks.
        settings: everything else.
    """

    defaults = DEFAULTS

    def __init__(self, experiment: Experiment, settings: Settings) -> None:
        self.experiment, self.settings = experiment, settings
        self.attack_settings = {name: getattr(experiment, name) for name in ATTACK_SETTINGS}
        self.cells = [self._cell(cell) for cell in all_cells(experiment, settings)]
        self.store = CellStore(Path(experiment.cells_dir), DEFAULTS)

    def cell_of(self, row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Cell | None:
        """Return the cell of a row; None for a method that is not there any more."""
        about = self.settings
        if settings is not None:
            known = {**DEFAULTS, **settings}
            about = replace(about, **{f.name: known[f.name] for f in fields(about) if f.name in known})
        labels = {name: row[name] for name in LABELS if row[name] is not None}
        try:
            return self._cell(MethodCell.from_method(row["method"], replace(about, seed=row["seed"], **labels)))
        except (KeyError, ValueError):
            return None

    def read_summary(self, file: Path) -> dict[str, Any]:
        """Read a summary; ValueError where the file is something else, or of another version."""
        return read_experiment(file)

    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        """Return the content of a summary."""
        return {
            "format": EXPERIMENT_FORMAT,
            "command": re.sub(r" --collect(=| )\w+", "", shlex.join(["python", *sys.argv])),
            "versions": versions_of(folder for cell in self.cells if (folder := self.store.find(cell))),
            "experiment": asdict(replace(self.experiment, collect=False)),
            "settings": asdict(self.settings),
            "cells": rows,
        }

    def _cell(self, cell: MethodCell, *, attacked: bool = True) -> Cell:
        names = self.experiment.attacks if attacked else ()
        return Cell(
            name=cell.directory,
            row=cell.row,
            settings=cell.depends_on(),
            make=partial(make, cell),
            model=cell.method.plain,
            parent=self._cell(cell.parent, attacked=False) if cell.parent else None,
            attacks={name: partial(attack, cell, name=name, experiment=self.experiment) for name in names},
            attack_settings=self.attack_settings,
            fingerprint=("forget_loss", "retain_loss"),
        )


def versions_of(folders: Iterable[Path]) -> dict[str, str]:
    """Return the versions of libraries that cells were trained with; where they differ, all of them."""
    found: dict[str, set[str]] = {}
    for file in (folder / RUN for folder in folders):
        for name, version in json.loads(file.read_text())["versions"].items() if file.exists() else ():
            found.setdefault(name, set()).add(version)
    return {name: " or ".join(sorted(versions)) for name, versions in found.items()}


def run_experiment(experiment: Experiment, settings: Settings) -> None:
    """Make and attack all cells that are not there yet, and write the summary after each; see `run_cells`.

    Args:
        experiment: methods, shares of labels, seeds and attacks.
        settings: everything else.

    Raises:
        ValueError: on an unknown method or attack, and where the summary file is another or of another version; at the end,
            where cells failed: which, and why.
    """
    design = Removal(experiment, settings)
    summary = SummaryFile(design, design.store, file=Path(experiment.summary_file))
    if experiment.collect:
        summary.restore()
        summary.write(keep=False)
        return
    summary.further_rows()  # raises before texts are read
    check_attacks(experiment, settings)
    run_cells(summary, Console())
