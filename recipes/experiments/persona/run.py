"""All cells of the experiment, one after another, continued where they were stopped; then the numbers and what they say."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from experiments.common.cells import ensure, prepare, read_numbers, write_summary
from experiments.common.criteria import terminal_checks
from experiments.persona.arms import ARMS
from experiments.persona.settings import Experiment, Settings, cell_key
from experiments.persona.start import ensure_start
from experiments.persona.summary import summarize, terminal_table
from experiments.persona.training import train_cell
from routed_peft.demo.display import quiet

FORMAT = 1


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``.

    A cell is an arm at a seed, with a directory of its own named after all it depends on, so none is made twice. A second run
    in the same directory waits for the cell that the first is at.

    Args:
        experiment: arms, seeds, and where to.
        settings: everything else.
        console: where results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    console = console or Console()
    records, place = prepare(experiment, settings)
    began, starts, cells = time.monotonic(), {}, []
    for seed in experiment.seeds:
        with quiet():
            start = ensure_start(settings, seed, place)
        starts[seed] = read_numbers(start)
        for arm in experiment.arms:
            folder = place / cell_key(arm, settings, seed)
            with quiet():
                numbers = ensure(folder, partial(train_cell, arm, settings, seed, start, folder))
            cells.append({"arm": arm, "seed": seed, **numbers})
            console.print(f"seed {seed}, {ARMS[arm].name}: {cells[-1]['seconds']:.0f} s", highlight=False)
    about = {"format": FORMAT, "settings": asdict(settings), "seconds": round(time.monotonic() - began, 1)}
    summary = write_summary(experiment, records, about | summarize(starts, cells, settings.guilty_from))
    console.print(terminal_table(summary), terminal_checks(summary), sep="\n")
    return summary
