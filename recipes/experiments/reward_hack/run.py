"""All cells of the experiment, a few at a time, continued where they were stopped; then table, figure and report."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from rich.console import Console

from experiments.common.cells import ensure, prepare, read_numbers, write_summary
from experiments.common.criteria import terminal_checks
from experiments.common.progress import Display, Messages, result_line
from experiments.reward_hack.arms import ARMS
from experiments.reward_hack.report import write_report
from experiments.reward_hack.settings import Experiment, Settings, cell_key, start_key
from experiments.reward_hack.start import ensure_start
from experiments.reward_hack.summary import summarize, terminal_table
from experiments.reward_hack.training import train_cell
from routed_peft.demo.display import quiet

FORMAT = 1
Cell = tuple[str, int]
"""An arm and a seed."""

_messages: Messages | None = None  # of this process


def run_experiment(experiment: Experiment, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Make every cell that is not there yet, and write ``summary.json``, ``curves.png`` and ``report.html``.

    A cell is an arm at a seed, with a directory of its own named after all it depends on, so none is made twice. A run that
    was stopped goes on; a second one in the same directory takes the cells that the first is not at.

    Args:
        experiment: arms, seeds, and where to.
        settings: everything else.
        console: where progress and results are shown; by default the terminal.

    Returns:
        What ``summary.json`` holds.
    """
    settings = settings.quick() if experiment.quick else settings
    console = console or Console()
    records, place = prepare(experiment, settings)
    cells = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    began = time.monotonic()
    with Display(console, len(cells), settings.steps) as display:
        _make_all(cells, settings, place, _processes(experiment, len(cells)), display)
    about = {"format": FORMAT, "settings": asdict(settings), "seconds": round(time.monotonic() - began, 1)}
    summary = write_summary(experiment, records, about | summarize(*collect(cells, settings, place)))
    write_report(records, summary, settings, records.path / "report.html")
    console.print(terminal_table(summary), terminal_checks(summary), summary["verdict"], sep="\n")
    console.print(f"Report: {records.path / 'report.html'}", soft_wrap=True)
    return summary


def collect(cells: Sequence[Cell], settings: Settings, place: Path) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Return the rates of the start models by seed, and the numbers of all cells."""
    seeds = dict.fromkeys(seed for _, seed in cells)
    starts = {seed: read_numbers(place / start_key(settings, seed)) for seed in seeds}
    rows = [{"arm": a, "seed": seed, **read_numbers(place / cell_key(a, settings, seed))} for a, seed in cells]
    return starts, rows


def _processes(experiment: Experiment, cells: int) -> int:
    return min(experiment.processes or os.cpu_count() or 1, cells)


def _make_all(cells: Sequence[Cell], settings: Settings, place: Path, processes: int, display: Display) -> None:
    pool, messages = _pool(processes)
    with pool:
        for seed in dict.fromkeys(seed for _, seed in cells):  # first, for every cell waits for its start model
            pool.submit(_start, settings, seed, place)
        todo = list(cells)
        while todo:
            futures = {cell: pool.submit(_cell, *cell, settings, place) for cell in todo}
            try:
                busy = _watch(futures, messages, display)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            if len(busy) == len(todo):
                time.sleep(5)  # other runs are at the rest
            todo = busy


def _pool(processes: int) -> tuple[Executor, Messages]:
    if processes == 1:
        messages: Any = queue.Queue()
        return ThreadPoolExecutor(1, initializer=_begin, initargs=(messages,)), messages
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    return ProcessPoolExecutor(processes, context, _begin, (messages,)), messages


def _watch(futures: Mapping[Cell, Future[Any]], messages: Messages, display: Display) -> list[Cell]:
    """Show steps and results until all is done; return the cells that other runs are at."""
    pending, busy = dict(futures), []
    while pending:
        with suppress(queue.Empty):
            while True:
                display.move(*messages.get_nowait())
        for cell, future in list(pending.items()):
            if future.done():
                del pending[cell]
                numbers = future.result()
                if numbers is None:
                    busy.append(cell)
                else:
                    display.finish(title(*cell), result_line(numbers, ARMS[cell[0]].scale))
        time.sleep(0.1)
    return busy


def title(arm: str, seed: int) -> str:
    """Return the name of a cell for people."""
    return f"seed {seed}, {arm}"


# In the processes


def _begin(messages: Messages) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(1)  # more would not make so small a model faster
    logging.getLogger("trl").setLevel(logging.ERROR)  # filtered rollouts have no reward on purpose


def _start(settings: Settings, seed: int, place: Path) -> None:
    with quiet():
        ensure_start(settings, seed, place)


def _cell(arm: str, seed: int, settings: Settings, place: Path) -> dict[str, Any] | None:
    """Make a cell where it is not there yet; return its numbers, or None while another run is at it."""
    folder, messages = place / cell_key(arm, settings, seed), _messages
    assert messages is not None

    def make() -> dict[str, Any]:
        start = ensure_start(settings, seed, place)
        return train_cell(arm, settings, seed, start, folder, lambda step: messages.put((title(arm, seed), step)))

    try:
        with quiet():
            return ensure(folder, make, timeout=0)
    except Timeout:
        return None
