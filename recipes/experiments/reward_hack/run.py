"""The experiment *reward hacking*, run: table, criteria, figure and report."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from experiments.common.arms import ArmsDesign, arms_at_seeds, run_arms
from experiments.reward_hack.arms import ARMS
from experiments.reward_hack.settings import Experiment, Settings
from experiments.reward_hack.start import make_start
from experiments.reward_hack.summary import result_line, summarize, terminal_table
from experiments.reward_hack.training import train_cell


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``, ``curves.png`` and ``report.html``.

    Args:
        experiment: arms, seeds, and where to.
        settings: everything else.
        console: where progress and results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    from experiments.reward_hack.report import write_report  # with matplotlib, which graders do not need

    settings = settings.quick() if experiment.quick else settings
    console = console or Console()
    if experiment.processes == 1:
        torch.set_num_threads(1)  # more would not make so small a model faster
    design = ArmsDesign(
        experiment,
        settings,
        arms=ARMS,
        asked=arms_at_seeds(experiment),
        train_start=make_start,
        train=train_cell,
        summary=summarize,
        describe=result_line,
    )
    records, summary = run_arms(design, terminal_table, console=console, processes=experiment.processes)
    write_report(records, summary, settings=settings, file=records.path / "report.html")
    console.print(summary["verdict"])
    console.print(f"Report: {records.path / 'report.html'}", soft_wrap=True)
    return summary
