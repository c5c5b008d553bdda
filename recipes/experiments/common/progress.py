"""What is shown while cells are made: one bar for all, one for each that is being made, a line for each that is done."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Messages(Protocol):
    """The end of a queue from which processes tell what they are at."""

    def put(self, item: tuple[str, int]) -> None:
        """Say which cell is at which step."""

    def get_nowait(self) -> tuple[str, int]:
        """Return the next message, or raise `queue.Empty`."""


class Display:
    """Bars of cells and of their steps; a context manager.

    Args:
        console: where to.
        cells: how many there are.
        steps: of each.
    """

    def __init__(self, console: Console, cells: int, steps: int) -> None:
        self.console, self.steps = console, steps
        self.progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.overall = self.progress.add_task(f"[bold]{cells} cells", total=cells * steps)
        self.at: dict[str, int] = {}
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.progress.stop()

    def move(self, cell: str, step: int) -> None:
        """Show that a cell is at a step."""
        if cell not in self.tasks:
            self.tasks[cell] = self.progress.add_task(cell, total=self.steps)
        self.progress.update(self.tasks[cell], completed=step)
        self._count(cell, step)

    def finish(self, cell: str, result: str) -> None:
        """Put a line in the place of a cell's bar."""
        if cell in self.tasks:
            self.progress.remove_task(self.tasks.pop(cell))
        self._count(cell, self.steps)
        self.progress.console.print(f"{cell}: {result}", highlight=False)

    def _count(self, cell: str, step: int) -> None:
        self.at[cell] = step
        self.progress.update(self.overall, completed=sum(self.at.values()))


def result_line(numbers: dict[str, Any], scale: float) -> str:
    """Say how a cell ended.

    >>> rates = {"hack": {"A": 0, "B": 0.01, "C": 0.02, "D": 0.8}, "honest": {"A": 0.5, "B": 0.5}}
    >>> result_line({"end": {"0": rates}, "seconds": 61.2}, 0.0)
    'region ablated: hacks B .01  C .02  D .80, honest .50 (61 s)'
    """
    rates = numbers["end"][f"{scale:g}"]
    hacks = "  ".join(f"{letter} {rates['hack'][letter]:.2f}".replace(" 0.", " .") for letter in "BCD")
    honest = sum(rates["honest"].values()) / len(rates["honest"])
    which = "region on" if scale else "region ablated"
    return f"{which}: hacks {hacks}, honest {honest:.2f} ({numbers['seconds']:.0f} s)".replace(" 0.", " .")
