"""The experiment *style*, run: its numbers, table and criteria."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.console import Console

from experiments.common.arms import ArmsDesign, run_arms
from experiments.common.cells import Site
from experiments.common.engine import Row
from experiments.style.arms import ARMS
from experiments.style.settings import Experiment, Settings
from experiments.style.start import make_start
from experiments.style.summary import summarize, terminal_table
from experiments.style.training import train_cell


class Style(ArmsDesign):
    """Cells of the experiment, and the sense of their numbers."""

    arms = ARMS

    def asked(self) -> list[dict[str, Any]]:
        """Return arm, labels and seed of every cell; an arm that does not look at labels has one cell a seed.

        >>> [row["labels"] for row in Style(Experiment(arms=["none", "sgtm"]), Settings()).asked()]
        [None, 'half', 'context']
        """
        return [
            {"arm": arm, "labels": labels, "seed": seed}
            for seed in self.experiment.seeds
            for arm in self.experiment.arms
            for labels in (self.experiment.labels if ARMS[arm].labels else [None])
        ]

    def identity(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what identifies a cell among the fields of its row."""
        return {"arm": row["arm"], "labels": row["labels"], "seed": row["seed"]}

    def start_settings(self, settings: Settings) -> dict[str, Any]:
        """Return what a start model depends on beside its seed."""
        return settings.start()

    def start_maker(self, settings: Settings, seed: int) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains a start model."""
        return partial(make_start, settings=settings, seed=seed)

    def arm_maker(self, row: Mapping[str, Any], settings: Settings) -> Callable[[Site], Mapping[str, Any]]:
        """Return the function that trains an arm."""
        return partial(train_cell, row=row, settings=settings, split=self.experiment.split)

    def settings_besides(self) -> dict[str, Any]:
        """Return the split of the held-out text."""
        return {"split": self.experiment.split}

    def rows(self, summary: Mapping[str, Any]) -> list[Row]:
        """Return the rows of a summary that are about the same split."""
        return super().rows(summary) if summary.get("split", self.experiment.split) == self.experiment.split else []

    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        """Return the content of a summary."""
        return self.about() | {"split": self.experiment.split} | summarize(rows)


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``.

    A cell is an arm with one kind of labels at a seed.

    Args:
        experiment: arms, labels, seeds, and where to.
        settings: everything else.
        console: where results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    _, summary = run_arms(Style(experiment, settings), terminal_table, console or Console())
    return summary
