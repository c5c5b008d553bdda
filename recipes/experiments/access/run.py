"""The experiment *access*, run: its numbers, table and criteria."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from experiments.access.arms import ARMS
from experiments.access.material import make_tokenizer
from experiments.access.settings import Experiment, Settings
from experiments.access.summary import summarize, terminal_table
from experiments.access.train_cell import train_cell
from experiments.common.arms import ArmsDesign, run_arms


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``, the content of which is returned.

    Args:
        experiment: arms, seeds, and where to.
        settings: everything else.
        console: where results are shown; by default the terminal.
    """
    design = ArmsDesign(
        experiment,
        settings,
        arms=ARMS,
        asked=[{"arm": arm, "seed": seed} for seed in experiment.seeds for arm in experiment.arms],
        train_start=make_tokenizer,
        train=partial(train_cell, split=experiment.split),
        summary=lambda _, cells: summarize(cells),
        about={"split": experiment.split},
    )
    return run_arms(design, terminal_table, console=console or Console())[1]
