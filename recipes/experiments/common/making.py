"""Cells made one after another by any number of processes, each of which leaves to the others what they are at."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from functools import partial

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
                if finish(store, cell, tell=tell):
                    tell("done", cell.name, cell.describe and cell.describe(store.numbers(cell) or {}))
                else:
                    left.append(cell)
            except ValueError as error:  # too few labels for the region to tell sides apart, say; the others go on
                failed[store.claim(cell).name] = f"{next(iter(cell.row.values()))}: {error}"
                tell("failed", cell.name, f"failed: {error}")
        if left and len(left) == len(todo):
            time.sleep(PAUSE)
        # a cell that came without its model and was made again, for others, has lost its attacks
        todo = left or [c for c in cells if store.claim(c).name not in failed and not store.is_done(c)]
    return failed


def finish(store: CellStore, cell: Cell, *, tell: Tell, as_parent: bool = False) -> bool:
    """Make and attack a cell as far as that is not done; return False where another process is at it, or at its parent.

    Args:
        store: directories of cells.
        cell: to be made.
        tell: told how far it is.
        as_parent: whether its model is needed, for a cell that is made from it, and its attacks are not.
    """
    if store.has_model(cell) if as_parent else store.is_done(cell):
        return True
    if cell.parent and not store.has_model(cell) and not finish(store, cell.parent, tell=tell, as_parent=True):
        return False
    folder, began = store.claim(cell), time.monotonic()
    site = Site(folder, store.claim(cell.parent) if cell.parent else folder, partial(tell, "step", cell.name))
    try:
        with store.lock(cell), silenced_libraries():
            if not store.has_model(cell):
                store.clear(cell)  # what an interruption left, or a summary without its model
                write_json(folder / NUMBERS, cell.make(site))
                tell("made", cell.name, f"made, {time.monotonic() - began:.0f} s")
            for name, attack in () if as_parent or cell.attacks is None else cell.attacks.items():
                if not store.attack_file(cell, name)[1]:
                    store.write_attack(cell, name, attack(site))
                    tell("made", cell.name, f"attacked by {name}, {time.monotonic() - began:.0f} s")
    except Timeout:
        return False
    return True


def make_cells_in_processes(store: CellStore, cells: Sequence[Cell], *, tell: Tell, processes: int) -> dict[str, str]:
    """Do what `make_cells` does with the help of other processes, of one thread each as this one."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=_help, args=(store, cells), daemon=True) for _ in range(processes - 1)]
    for helper in helpers:
        helper.start()
    try:
        return make_cells(store, cells, tell)  # what a helper failed at is tried again here, and told
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _help(store: CellStore, cells: Sequence[Cell]) -> None:
    torch.set_num_threads(1)
    make_cells(store, cells, lambda *_: None)
