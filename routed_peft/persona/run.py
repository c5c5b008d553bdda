"""All cells of the experiment, one after another, continued where they were stopped; then the numbers and what they say."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from routed_peft.demo.display import quiet
from routed_peft.persona.arms import ARMS
from routed_peft.persona.settings import Experiment, Settings, cell_key, start_key
from routed_peft.persona.start import ensure_start
from routed_peft.persona.summary import summarize, terminal_table
from routed_peft.persona.training import train_cell
from routed_peft.reward_hack.start import write_json
from routed_peft.reward_hack.summary import terminal_checks
from routed_peft.training import RunDirectory

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
    console, out = console or Console(), Path(experiment.output_dir).expanduser().resolve()
    place = out / "cells"
    place.mkdir(parents=True, exist_ok=True)
    seeds = {f"seed {seed}": seed for seed in experiment.seeds}
    RunDirectory(out).start({"experiment": asdict(experiment), **asdict(settings)}, seeds, resume=True)
    began, starts, cells = time.monotonic(), {}, []
    for seed in experiment.seeds:
        with quiet():
            start = ensure_start(settings, seed, place)
        starts[seed] = json.loads((place / start_key(settings, seed) / "numbers.json").read_text(encoding="utf-8"))
        for arm in experiment.arms:
            with quiet():
                cells.append({"arm": arm, "seed": seed, **ensure_cell(arm, settings, seed, start, place)})
            console.print(f"seed {seed}, {ARMS[arm].name}: {cells[-1]['seconds']:.0f} s", highlight=False)
    about = {"format": FORMAT, "settings": asdict(settings), "seconds": round(time.monotonic() - began, 1)}
    summary: dict[str, Any] = json.loads(json.dumps(about | summarize(starts, cells)))  # keys as a reader finds them
    for file in [out / "summary.json", *([Path(experiment.summary_file)] if experiment.summary_file else [])]:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, summary)
    console.print(terminal_table(summary), terminal_checks(summary), sep="\n")
    return summary


def ensure_cell(arm: str, settings: Settings, seed: int, start: Path, place: Path) -> dict[str, Any]:
    """Return the numbers of a cell, which is made if it is not there yet."""
    folder = place / cell_key(arm, settings, seed)
    file = folder / "numbers.json"
    with FileLock(f"{folder}.lock"):
        if not file.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interruption left
            write_json(file, train_cell(arm, settings, seed, start, folder))
    numbers: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return numbers
