"""All cells of an experiment, one after the other, continued where they were stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from experiments.removal.cells import NUMBERS, Cell, Experiment, all_cells
from experiments.removal.summary import attack_file, further_rows, restore, write_json, write_summary
from experiments.removal.train_cell import attack, check_attacks, make
from routed_peft.demo.display import quiet
from routed_peft.demo.settings import DemoSettings


class Bar(TrainerCallback):
    """Shows the steps of one training run."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put up a bar."""
        self.task = self.progress.add_task("training", total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show a step."""
        self.progress.update(self.task, completed=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.progress.remove_task(self.task)


def finish(cell: Cell, cells: Path, experiment: Experiment, progress: Progress, kept: bool = False) -> bool:
    """Make and attack a cell as far as that is not done; return False where another process is at it, or at its parent.

    Args:
        cell: which one.
        cells: directory of all cells.
        experiment: its attacks.
        progress: where bars are shown.
        kept: whether its model must be there as well, for a cell that is made from it.
    """
    folder, began = cells / cell.key, time.monotonic()
    if is_done(cell, folder, experiment) and not (kept and not has_model(cell, folder)):
        return True
    parent = cell.method.parent and Cell.of(cell.method.parent, cell.settings)
    if parent and not finish(parent, cells, replace(experiment, attacks=[]), progress, kept=True):
        return False
    source = cells / parent.key if parent else folder
    jobs: dict[Path, Callable[[], Any]] = {folder / NUMBERS: partial(make, cell, folder, source, Bar(progress))}
    for name in experiment.attacks:
        jobs[attack_file(folder, name, experiment)] = partial(attack, cell, folder, name, experiment)
    try:
        with FileLock(cells / f"{cell.key}.lock", timeout=0):
            if not has_model(cell, folder):
                shutil.rmtree(folder, ignore_errors=True)  # what an interruption left, or a summary without its model
            for file, job in jobs.items():
                if file.exists():
                    continue
                if file.name == NUMBERS:
                    shutil.rmtree(folder, ignore_errors=True)
                with quiet():
                    result = job()
                write_json(file, result)
                progress.console.print(f"{cell.key}: {file.stem}, {time.monotonic() - began:.0f} s")
    except Timeout:
        return False
    return True


def is_done(cell: Cell, folder: Path, experiment: Experiment) -> bool:
    """Return whether a cell was measured, and attacked as the experiment asks."""
    return all(
        file.exists()
        for file in (folder / NUMBERS, *(attack_file(folder, name, experiment) for name in experiment.attacks))
    )


def has_model(cell: Cell, folder: Path) -> bool:
    """Return whether a cell's finished model lies in its directory, and not its numbers alone."""
    return (folder / NUMBERS).exists() and (folder / cell.method.plain).is_dir()


def run_experiment(experiment: Experiment, settings: DemoSettings) -> None:
    """Make and attack all cells that are not there yet, and write the summary after each.

    Cells whose numbers stand in the summary already are not made again, even if their directories are gone. Start it in as
    many processes as there is room for: a cell that one of them is at is left to it.

    Args:
        experiment: methods, shares of labels, seeds and attacks.
        settings: everything else.

    Raises:
        ValueError: on an unknown method or attack, and where the summary file is another or of another version; at the end,
            where cells failed, which ones and why.
    """
    cells, place = all_cells(experiment, settings), Path(experiment.cells_dir)
    place.mkdir(parents=True, exist_ok=True)
    if not experiment.collect:
        further_rows(experiment, settings, cells)  # raises now rather than after the first cell
        check_attacks(experiment, settings)
    restore(experiment, cells, place)
    if experiment.collect:
        write_summary(experiment, settings, cells, place)
        return
    failed: dict[str, str] = {}
    gone: set[str] = set()
    with Progress(console=Console()) as progress:
        task = progress.add_task(f"{settings.pair}: {len(cells)} cells", total=len(cells))
        todo = cells
        while todo:
            left = []
            for cell in todo:
                try:
                    done = finish(cell, place, experiment, progress)
                except ValueError as error:  # too few labels for the region to tell sides apart, say; the others go on
                    failed[f"{cell.shown}, {cell.key}"] = str(error)
                    gone.add(cell.key)
                    progress.console.print(f"{cell.key}: failed: {error}", markup=False)
                    progress.advance(task)
                    continue
                if done:
                    write_summary(experiment, settings, cells, place)
                    progress.advance(task)
                else:
                    left.append(cell)
            if left and len(left) == len(todo):
                time.sleep(5)  # other processes are at the rest
            # a cell that came without its model and was made again, for others, has lost its attacks
            todo = left or [
                cell for cell in cells if cell.key not in gone and not is_done(cell, place / cell.key, experiment)
            ]
    if failed:
        reasons = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise ValueError(
            f"{len(failed)} of {len(cells)} cells failed; the others are in {experiment.summary_file}:\n{reasons}"
        )
