"""The experiment *style*, run: its numbers, table and criteria."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from experiments.common.arms import ArmsDesign, run_arms
from experiments.style.arms import ARMS
from experiments.style.settings import Experiment, Settings
from experiments.style.start import make_start
from experiments.style.summary import summarize, terminal_table
from experiments.style.training import train_cell


def all_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """Return arm, labels and seed of every cell; an arm that does not look at labels has one cell a seed.

    >>> [row["labels"] for row in all_rows(Experiment(arms=["none", "sgtm"]))]
    [None, 'half', 'context']
    """
    return [
        {"arm": arm, "labels": labels, "seed": seed}
        for seed in experiment.seeds
        for arm in experiment.arms
        for labels in (experiment.labels if ARMS[arm].labels else [None])
    ]


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``, the content of which is returned.

    Args:
        experiment: arms, labels, seeds, and where to.
        settings: everything else.
        console: where results are shown; by default the terminal.
    """
    design = ArmsDesign(
        experiment,
        settings,
        arms=ARMS,
        asked=all_rows(experiment),
        train_start=make_start,
        train=partial(train_cell, split=experiment.split),
        summary=lambda _, cells: summarize(cells),
        about={"split": experiment.split},
    )
    return run_arms(design, terminal_table, console=console or Console())[1]
