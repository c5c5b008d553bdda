"""The experiment *reward hacking*, run: table, criteria, figure and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console

from experiments.common.arms import ArmsDesign, run_arms, split_starts
from experiments.common.cells import Site
from experiments.common.engine import Row
from experiments.reward_hack.arms import ARMS
from experiments.reward_hack.report import write_report
from experiments.reward_hack.settings import Experiment, Settings
from experiments.reward_hack.start import make_start
from experiments.reward_hack.summary import result_line, summarize, terminal_table
from experiments.reward_hack.training import train_cell


class RewardHack(ArmsDesign):
    """Cells of the experiment, and the sense of their numbers."""

    arms = ARMS

    def start_settings(self, settings: Settings) -> dict[str, Any]:
        """Return what a start model depends on beside its seed."""
        return settings.start()

    def start_maker(self, settings: Settings, seed: int) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains a start model."""
        return partial(make_start, settings=settings, seed=seed)

    def arm_maker(self, row: Mapping[str, Any], settings: Settings) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains an arm."""
        return partial(train_cell, arm=row["arm"], settings=settings, seed=row["seed"])

    def result_line(self, arm: str) -> Callable[[Mapping[str, Any]], str]:
        """Return what writes the rates of an arm as one line."""
        return partial(result_line, scale=ARMS[arm].scale)

    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        """Return the content of a summary."""
        return self.about() | summarize(*split_starts(rows))


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``, ``curves.png`` and ``report.html``.

    Args:
        experiment: arms, seeds, and where to.
        settings: everything else.
        console: where progress and results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    settings = settings.quick() if experiment.quick else settings
    console = console or Console()
    if experiment.processes == 1:
        torch.set_num_threads(1)  # more would not make so small a model faster
    design = RewardHack(experiment, settings)
    records, summary = run_arms(design, terminal_table, console, processes=experiment.processes)
    write_report(records, summary, settings, records.path / "report.html")
    console.print(summary["verdict"])
    console.print(f"Report: {records.path / 'report.html'}", soft_wrap=True)
    return summary
