"""Experiments that compare arms: ways to train copies of one start model, at several seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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


@dataclass
class ArmsDesign(Design):
    """Arms at seeds, each trained from the start model of its seed.

    Attributes:
        experiment: dataclass with ``output_dir``, ``summary_file`` and ``seeds``.
        settings: dataclass of all else that cells depend on; ``start()`` returns what start models do.
        arms: dataclasses by key.
        asked: rows of the cells that are asked for: ``arm``, ``seed`` and more; see `arms_at_seeds`.
        train_start: trains a start model, given its site, ``settings`` and ``seed``, and returns its numbers.
        train: trains an arm, given its site, ``row`` and ``settings``, and returns its numbers.
        summary: makes a summary of start models' numbers by seed, and of the rows of arms.
        about: what arms depend on beside row and settings; stands in the summary.
        describe: writes the numbers of an arm, given its key, as a line.
    """

    experiment: Any
    settings: Any
    arms: Mapping[str, Any]
    asked: Sequence[Mapping[str, Any]]
    train_start: Callable[..., Mapping[str, Any]]
    train: Callable[..., Mapping[str, Any]]
    summary: Callable[[Mapping[int, Any], Sequence[Row]], dict[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    describe: Callable[[str, Mapping[str, Any]], str] | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.cells = [cell for row in self.asked if (cell := self.cell_of(row)) is not None]

    def cell_of(self, row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Cell | None:
        """Return the cell of an arm, or of a start model, at a seed."""
        known, arm, seed = self.settings, row["arm"], row["seed"]
        if settings is not None:  # those that both know
            known = replace(known, **{name: settings[name] for name in asdict(known).keys() & settings.keys()})
        start = Cell(
            name=f"{START}-{seed}",
            row={"arm": START, "seed": seed},
            settings={"seed": seed, **known.start()},
            make=partial(self.train_start, settings=known, seed=seed),
            model="config.json",
        )
        if arm == START or arm not in self.arms:
            return start if arm == START else None
        named = {name: row[name] for name in ("arm", "labels", "seed") if name in row}
        return Cell(
            name="-".join("any" if value is None else str(value) for value in named.values()),
            row=named,
            settings={**named, "arm": asdict(self.arms[arm]), **asdict(known), **self.about},
            make=partial(train_recorded, train=self.train, row=named, arm=self.arms[arm], settings=known),
            model="run",
            parent=start,
            describe=partial(self.describe, arm) if self.describe else None,
        )

    def rows(self, summary: Mapping[str, Any]) -> list[Row]:
        """Return the rows of arms in a summary, and those of start models; none where it is about something else."""
        if any(summary.get(name, value) != value for name, value in self.about.items()):
            return []
        starts = [{"arm": START, "seed": int(seed), **rates} for seed, rates in summary.get("starts", {}).items()]
        return [*starts, *summary["cells"]]

    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        """Return the content of a summary."""
        about = ("arm", "seed", "key", "settings")
        starts = {row["seed"]: {k: v for k, v in row.items() if k not in about} for row in rows if row["arm"] == START}
        seconds = round(time.monotonic() - self.began, 1)
        head = {"format": FORMAT, **self.about, "settings": asdict(self.settings), "seconds": seconds}
        return head | self.summary(starts, [row for row in rows if row["arm"] != START])


def train_recorded(
    site: Site, *, train: Callable[..., Mapping[str, Any]], row: Mapping[str, Any], arm: Any, settings: Any
) -> dict[str, Any]:
    """Train an arm, keep the records of its run, and return its numbers with the ``seconds`` it took."""
    began, records = time.monotonic(), RunDirectory(site.folder)
    records.start({**row, **asdict(arm), **asdict(settings)}, seeds={"seed": row["seed"]})
    numbers = {**train(site, row, settings=settings), "seconds": round(time.monotonic() - began, 1)}
    records.finish(numbers)
    return numbers


def arms_at_seeds(experiment: Any) -> list[dict[str, Any]]:
    """Return the rows of start models, then those of arms, seed by seed."""
    starts = [{"arm": START, "seed": seed} for seed in experiment.seeds]
    return [*starts, *({"arm": arm, "seed": seed} for seed in experiment.seeds for arm in experiment.arms)]


def run_arms(
    design: ArmsDesign, table: Callable[[Mapping[str, Any]], Table], *, console: Console, processes: int = 1
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
    files = SummaryFile(design, CellStore(records.path / "cells"), file=file, copies=[records.path / "summary.json"])
    summary = run_cells(files, console, processes=processes)
    console.print(table(summary), terminal_checks(summary), sep="\n")
    return records, summary


def check_chosen(seeds: Sequence[int], **chosen: tuple[Sequence[str], Mapping[str, Any]]) -> None:
    """Raise ValueError where there are no seeds, or an option names something that does not exist.

    >>> check_chosen([0], arms=(["none", "nothing"], {"none": 1}))
    Traceback (most recent call last):
    ...
    ValueError: `arms` has ['nothing']; take some of ['none']
    """
    for option, (asked, known) in chosen.items():
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"`{option}` has {unknown}; take some of {list(known)}")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"`seeds` must be numbers from 0, got {list(seeds)}")
    if not seeds:
        raise ValueError("`seeds` is empty: give at least one, such as `--seeds 0`")
