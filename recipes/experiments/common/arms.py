"""Experiments that compare arms: ways to train copies of one start model, at several seeds."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.cells import Cell, CellStore, Site
from experiments.common.criteria import terminal_checks
from experiments.common.engine import Design, Row, SummaryFile, run_cells
from routed_peft.training import RunDirectory

ALL, START = "all", "start"
FORMAT = 1


class ArmsDesign(Design):
    """Every arm at every seed, each trained from the start model of its seed.

    Args:
        experiment: dataclass with ``output_dir``, ``summary_file``, ``arms`` and ``seeds``.
        settings: dataclass of all that cells depend on besides.

    Attributes:
        arms: dataclasses by key.
    """

    arms: Mapping[str, Any]

    def __init__(self, experiment: Any, settings: Any) -> None:
        self.experiment, self.settings, self.began = experiment, settings, time.monotonic()
        self.cells = [cell for row in self.asked() if (cell := self.cell_of(row)) is not None]

    @abstractmethod
    def start_settings(self, settings: Any) -> dict[str, Any]:
        """Return what a start model depends on beside its seed."""

    @abstractmethod
    def start_maker(self, settings: Any, seed: int) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains a start model into the directory of a site."""

    @abstractmethod
    def arm_maker(self, row: Mapping[str, Any], settings: Any) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains an arm; the start model is in the parent's directory of its site."""

    def asked(self) -> Sequence[Mapping[str, Any]]:
        """Return what identifies the cells that are asked for: start models first, then arms, seed by seed."""
        seeds = self.experiment.seeds
        starts = [{"arm": START, "seed": seed} for seed in seeds]
        return [*starts, *({"arm": arm, "seed": seed} for seed in seeds for arm in self.experiment.arms)]

    def identity(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what identifies a cell among the fields of its row."""
        return {"arm": row["arm"], "seed": row["seed"]}

    def settings_besides(self) -> dict[str, Any]:
        """Return what an arm depends on beside its row and the settings."""
        return {}

    def result_line(self, arm: str) -> Callable[[Mapping[str, Any]], str] | None:
        """Return what writes the numbers of an arm as one line; None for a line without numbers."""
        return None

    def cell_of(self, row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Cell | None:
        """Return the cell of an arm, or of a start model, at a seed."""
        about, arm, seed = self.settings, row["arm"], row["seed"]
        if settings is not None:  # those that both know
            about = replace(about, **{name: settings[name] for name in asdict(about).keys() & settings.keys()})
        start = Cell(
            name=f"{START}-{seed}",
            row={"arm": START, "seed": seed},
            settings={"seed": seed, **self.start_settings(about)},
            make=self.start_maker(about, seed),
            model="config.json",
        )
        if arm == START:
            return start
        if arm not in self.arms:
            return None
        named = self.identity(row)
        return Cell(
            name="-".join("any" if value is None else str(value) for value in named.values()),
            row=named,
            settings={**named, "arm": asdict(self.arms[arm]), **asdict(about), **self.settings_besides()},
            make=self.arm_maker(named, about),
            model="run",
            parent=start,
            describe=self.result_line(arm),
        )

    def rows(self, summary: Mapping[str, Any]) -> list[Row]:
        """Return the rows of arms in a summary, and those of start models."""
        starts = [{"arm": START, "seed": int(seed), **rates} for seed, rates in summary.get("starts", {}).items()]
        return [*starts, *summary["cells"]]

    def about(self) -> dict[str, Any]:
        """Return what opens a summary."""
        seconds = round(time.monotonic() - self.began, 1)
        return {"format": FORMAT, "settings": asdict(self.settings), "seconds": seconds}


def split_starts(rows: Sequence[Row]) -> tuple[dict[int, Row], list[Row]]:
    """Return the numbers of start models by seed, and the rows of arms.

    >>> split_starts([{"arm": "start", "seed": 0, "right": 0.5, "key": "start-0"}, {"arm": "none", "seed": 0}])
    ({0: {'right': 0.5}}, [{'arm': 'none', 'seed': 0}])
    """
    about = ("arm", "seed", "key", "settings")
    starts = {row["seed"]: {k: v for k, v in row.items() if k not in about} for row in rows if row["arm"] == START}
    return starts, [row for row in rows if row["arm"] != START]


def run_arms(
    design: ArmsDesign, table: Callable[[Mapping[str, Any]], Table], console: Console, *, processes: int = 1
) -> tuple[RunDirectory, dict[str, Any]]:
    """Make all cells below the experiment's ``output_dir``; print the table and the criteria.

    Returns:
        The records of the experiment, and what its ``summary.json`` holds.
    """
    experiment = design.experiment
    records = RunDirectory(Path(experiment.output_dir).expanduser())
    seeds = {f"seed {seed}": seed for seed in experiment.seeds}
    records.start({"experiment": asdict(experiment), **asdict(design.settings)}, seeds, resume=True)
    file = Path(experiment.summary_file) if experiment.summary_file else None
    store = CellStore(records.path / "cells", design.defaults)
    files = SummaryFile(design, store, file, [records.path / "summary.json"])
    summary = run_cells(files, console, processes=processes)
    console.print(table(summary), terminal_checks(summary), sep="\n")
    return records, summary


def check_choice(option: str, asked: Sequence[str], known: Mapping[str, Any]) -> None:
    """Raise ValueError where an option names something unknown."""
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"`{option}` has {unknown}; take some of {list(known)}")


def check_arms(asked: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Return the arms that are asked for, `ALL` written out; ValueError for one that does not exist."""
    if list(asked) == [ALL]:
        return list(known)
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"`arms` has {unknown}; the arms are {list(known)}, or {ALL!r} alone")
    return list(asked)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError where there are none."""
    if not seeds:
        raise ValueError("`seeds` is empty: give at least one, such as `--seeds 0`")
