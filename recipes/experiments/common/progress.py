"""Display of cells that are being made: one bar for all, one for each in progress, a line for each that is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import progress as bars
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.common.cells import Tick

Tell = Callable[..., None]
"""Told an event, the name of a cell, and more: "step" (step, steps), "made", "done" or "failed" (line, or None)."""


class Display:
    """Bars of cells and of their steps; a context manager.

    Args:
        console: where to.
        cells: number of cells.
        on_made: called whenever a cell, or an attack on it, has been made.
    """

    def __init__(self, console: Console, cells: int, on_made: Callable[[], object]) -> None:
        self.bars = bars.Progress(
            bars.TextColumn("{task.description:<34}"),
            bars.BarColumn(bar_width=20),
            bars.TextColumn("{task.percentage:>3.0f} %"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(compact=True),
            console=console,
        )
        self.on_made = on_made
        self.overall = self.bars.add_task(f"[bold]{cells} cells", total=cells)
        self.tasks: dict[str, bars.TaskID] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()

    def tell(self, event: str, cell: str, *about: Any) -> None:
        """Show an event of a cell, see `Tell`."""
        if event == "step":
            if cell not in self.tasks:
                self.tasks[cell] = self.bars.add_task(cell)
            self.bars.update(self.tasks[cell], completed=about[0], total=about[1])
            return
        if cell in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell))
        if about[0]:
            self.bars.console.print(f"{cell}: {about[0]}", highlight=False, markup=False)
        if event == "made":
            self.on_made()
        else:
            self.bars.advance(self.overall)


class Ticker(TrainerCallback):
    """Tells each step of a trainer."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the step."""
        self.tick(state.global_step, state.max_steps)
