"""All cells of the experiment, one after another, continued where they were stopped; then the numbers and what they say."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

from experiments.common.cells import ensure, prepare, write_summary
from experiments.common.criteria import terminal_checks
from experiments.style.arms import ARMS
from experiments.style.settings import Experiment, Settings, cell_key
from experiments.style.start import ensure_start
from experiments.style.summary import summarize, terminal_table
from experiments.style.training import train_cell
from routed_peft.demo.display import quiet

FORMAT = 1


def all_cells(experiment: Experiment) -> list[tuple[str, str | None, int]]:
    """Return arm, labels and seed of every cell; arms to which labels mean nothing stand there once a seed.

    >>> all_cells(Experiment(arms=["none", "sgtm"]))
    [('none', None, 0), ('sgtm', 'half', 0), ('sgtm', 'context', 0)]
    """
    return [
        (arm, labels, seed)
        for seed in experiment.seeds
        for arm in experiment.arms
        for labels in (experiment.labels if ARMS[arm].labels else [None])
    ]


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``.

    A cell is an arm with one kind of labels at a seed. It has a directory of its own named after all it depends on, so none
    is made twice, and a second run in the same directory waits for the cell that the first is at.

    Args:
        experiment: arms, labels, seeds, and where to.
        settings: everything else.
        console: where results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    console = console or Console()
    records, place = prepare(experiment, settings)
    began, cells = time.monotonic(), []
    for arm, labels, seed in all_cells(experiment):
        folder = place / cell_key(arm, labels, settings, seed, experiment.split)
        with quiet():
            start = ensure_start(settings, seed, place)
            numbers = ensure(folder, partial(train_cell, arm, labels, settings, seed, experiment.split, start, folder))
        cells.append({"arm": arm, "labels": labels, "seed": seed, **numbers})
        console.print(f"seed {seed}, {ARMS[arm].name}, {labels or 'any'}: {numbers['seconds']:.0f} s", highlight=False)
    about = {"format": FORMAT, "split": experiment.split, "settings": asdict(settings)}
    about["seconds"] = round(time.monotonic() - began, 1)
    summary = write_summary(experiment, records, about | summarize(cells))
    console.print(terminal_table(summary), terminal_checks(summary), sep="\n")
    return summary
