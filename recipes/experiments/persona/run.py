"""The experiment *persona by subspace*, run: its numbers, table and criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.console import Console

from experiments.common.arms import ArmsDesign, run_arms, split_starts
from experiments.common.cells import Site
from experiments.common.engine import Row
from experiments.persona.arms import ARMS
from experiments.persona.settings import Experiment, Settings
from experiments.persona.start import make_start
from experiments.persona.summary import summarize, terminal_table
from experiments.persona.training import train_cell


class Persona(ArmsDesign):
    """Cells of the experiment, and the sense of their numbers."""

    arms = ARMS

    def start_settings(self, settings: Settings) -> dict[str, Any]:
        """Return what a start model depends on beside its seed."""
        return settings.start() | {"loud_share": settings.loud_share}

    def start_maker(self, settings: Settings, seed: int) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains a start model."""
        return partial(make_start, settings=settings, seed=seed)

    def arm_maker(self, row: Mapping[str, Any], settings: Settings) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains an arm."""
        return partial(train_cell, arm=row["arm"], settings=settings, seed=row["seed"])

    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        """Return the content of a summary."""
        return self.about() | summarize(*split_starts(rows), self.settings.guilty_from)


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``.

    Args:
        experiment: arms, seeds, and where to.
        settings: everything else.
        console: where results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    _, summary = run_arms(Persona(experiment, settings), terminal_table, console or Console())
    return summary
