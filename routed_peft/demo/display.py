"""Progress bars of the demo, one overall and one per arm."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from routed_peft.demo.settings import ARMS, Arm, DemoSettings


class Display(Progress):
    """Progress bars. The unit is about the time of one training step."""

    def __init__(self, console: Console, settings: DemoSettings) -> None:
        super().__init__(
            TextColumn("{task.description:<19}"),
            BarColumn(bar_width=14),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self.measuring, self.attacking = max(1, settings.steps // 8), max(1, settings.steps // 30)
        each = settings.steps + self.measuring + self.attacking * len(settings.relearn_learning_rates)
        self.overall = self.add_task("[bold]all", total=each * len(ARMS), status="")
        self.bars = {arm.key: self.add_task(arm.name, total=each, start=False, status="waiting") for arm in ARMS}

    def overall_status(self, status: str) -> None:
        """Show a status beside the overall bar."""
        self.update(self.overall, status=status)

    def begin(self, arm: Arm) -> None:
        """Start the clock of an arm."""
        self.start_task(self.bars[arm.key])
        self.overall_status("left")

    def status(self, arm: Arm, status: str, advance: float = 0) -> None:
        """Show the status of an arm, and move its bar and the overall one."""
        self.update(self.bars[arm.key], status=status, advance=advance)
        self.update(self.overall, advance=advance)

    def finish(self, arm: Arm, result: str) -> None:
        """Fill the bar of an arm; where there are no live bars, print a line."""
        self.status(arm, result)
        if not self.console.is_terminal:
            self.console.print(f"{arm.name}: {result}")


class Watcher(TrainerCallback):
    """A callback that moves the bar of an arm with every training step."""

    def __init__(self, display: Display, arm: Arm) -> None:
        self.display, self.arm, self.text = display, arm, "training"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on by one."""
        self.display.status(self.arm, self.text, advance=1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.text = f"training, loss {float(logs['loss']):.2f}"
