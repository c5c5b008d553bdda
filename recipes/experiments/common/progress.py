"""Display of cells that are being made: one bar for all, one for each in progress, a line for each that is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rich import progress as bars
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.common.cells import Tick


class Progress(Protocol):
    """Listener to what happens to cells, which are told by their names."""

    def step(self, cell: str, step: int, steps: int) -> None:
        """Take note of a cell's step."""

    def made(self, cell: str, about: str) -> None:
        """Take note that a cell, or an attack on it, has been made."""

    def done(self, cell: str) -> None:
        """Take note that nothing is left to be done for a cell."""

    def failed(self, cell: str, reason: str) -> None:
        """Take note that a cell cannot be made."""


class Messages(Protocol):
    """A queue by which processes tell what they are at."""

    def put(self, item: tuple[Any, ...]) -> None:
        """Add the name of a method of `Progress` and its arguments."""

    def get_nowait(self) -> tuple[Any, ...]:
        """Return the next message, or raise `queue.Empty`."""


class Display:
    """Bars of cells and of their steps; a context manager and a `Progress`.

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
        self.finished: set[str] = set()
        self.tasks: dict[str, bars.TaskID] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()

    def step(self, cell: str, step: int, steps: int) -> None:
        """Move the bar of a cell."""
        if cell not in self.tasks:
            self.tasks[cell] = self.bars.add_task(cell, total=steps)
        self.bars.update(self.tasks[cell], completed=step, total=steps)

    def made(self, cell: str, about: str) -> None:
        """Put a line in the place of a cell's bar."""
        self._line(cell, about)
        self.on_made()

    def done(self, cell: str) -> None:
        """Move the bar of all cells."""
        self.finished.add(cell)
        self.bars.update(self.overall, completed=len(self.finished))

    def failed(self, cell: str, reason: str) -> None:
        """Say why a cell failed."""
        self._line(cell, f"failed: {reason}")
        self.done(cell)

    def _line(self, cell: str, text: str) -> None:
        if cell in self.tasks:
            self.bars.remove_task(self.tasks.pop(cell))
        self.bars.console.print(f"{cell}: {text}", highlight=False, markup=False)


class Ticker(TrainerCallback):
    """Tells each step of a trainer."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the step."""
        self.tick(state.global_step, state.max_steps)
