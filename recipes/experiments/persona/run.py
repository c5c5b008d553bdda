"""The experiment *persona by subspace*, run: its numbers, table and criteria."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from experiments.common.arms import ArmsDesign, arms_at_seeds, run_arms
from experiments.persona.arms import ARMS
from experiments.persona.settings import Experiment, Settings
from experiments.persona.start import make_start
from experiments.persona.summary import summarize, terminal_table
from experiments.persona.training import train_cell


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
        asked=arms_at_seeds(experiment),
        train_start=make_start,
        train=train_cell,
        summary=partial(summarize, guilty_from=settings.guilty_from),
    )
    return run_arms(design, terminal_table, console=console or Console())[1]
