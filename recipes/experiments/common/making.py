"""Cells made one after another by any number of processes, each of which leaves to the others what they are at."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from filelock import Timeout

from experiments.common.cells import NUMBERS, Cell, CellStore, Site, write_json
from experiments.common.progress import Tell
from routed_peft.runs.silence import silenced_libraries

PAUSE = 2.0
"""Seconds until cells are looked at again that other processes are at."""


def make_cells(store: CellStore, cells: Sequence[Cell], tell: Tell) -> dict[str, str]:
    """Make and attack all cells that are not there yet.

    Args:
        store: their directories.
        cells: in the order in which they are made.
        tell: told how far they are, as `Display.tell` is.

    Returns:
        Directories of cells that failed, and why.
    """
    failed: dict[str, str] = {}
    todo = list(cells)
    while todo:
        left = []
        for cell in todo:
            try:
                if finish(store, cell, tell):
                    tell("done", cell.name)
                else:
                    left.append(cell)
            except ValueError as error:  # too few labels for the region to tell sides apart, say; the others go on
                failed[store.claim(cell).name] = f"{next(iter(cell.row.values()))}: {error}"
                tell("failed", cell.name, str(error))
        if left and len(left) == len(todo):
            time.sleep(PAUSE)
        # a cell that came without its model and was made again, for others, has lost its attacks
        todo = left or [c for c in cells if store.claim(c).name not in failed and not store.is_done(c)]
    return failed


def finish(store: CellStore, cell: Cell, tell: Tell, *, as_parent: bool = False) -> bool:
    """Make and attack a cell as far as that is not done; return False where another process is at it, or at its parent.

    Args:
        store: directories of cells.
        cell: to be made.
        tell: told how far it is.
        as_parent: whether its model is needed, for a cell that is made from it, and its attacks are not.
    """
    if store.has_model(cell) if as_parent else store.is_done(cell):
        return True
    if cell.parent and not store.has_model(cell) and not finish(store, cell.parent, tell, as_parent=True):
        return False
    folder, began = store.claim(cell), time.monotonic()
    site = Site(folder, store.claim(cell.parent) if cell.parent else folder, partial(tell, "step", cell.name))
    try:
        with store.lock(cell), silenced_libraries():
            if not store.has_model(cell):
                store.clear(cell)  # what an interruption left, or a summary without its model
                numbers = cell.make(site)
                write_json(folder / NUMBERS, numbers)
                about = cell.describe(numbers) if cell.describe else "made"
                tell("made", cell.name, f"{about}, {time.monotonic() - began:.0f} s")
            for name, attack in () if as_parent or cell.attacks is None else cell.attacks.items():
                if not store.attack_file(cell, name)[1]:
                    store.write_attack(cell, name, attack(site))
                    tell("made", cell.name, f"attacked by {name}, {time.monotonic() - began:.0f} s")
    except Timeout:
        return False
    return True


def make_cells_in_processes(store: CellStore, cells: Sequence[Cell], tell: Tell, *, processes: int) -> dict[str, str]:
    """Do what `make_cells` does in several processes of one thread each, and tell of all of them."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    with ProcessPoolExecutor(processes, context, _begin, (messages,)) as pool:
        workers: list[Future[dict[str, str]]] = [pool.submit(_work, store, cells) for _ in range(processes)]
        try:
            running = True
            while running:
                running = not all(worker.done() for worker in workers)  # first, so that no message after it is lost
                with suppress(queue.Empty):
                    while True:
                        tell(*messages.get(timeout=0.1))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: reason for worker in workers for name, reason in worker.result().items()}


_messages: Any = None  # of a process of the pool


def _begin(messages: Any) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(1)  # more would not make a small model faster


def _work(store: CellStore, cells: Sequence[Cell]) -> dict[str, str]:
    return make_cells(store, cells, lambda *about: _messages.put(about))
