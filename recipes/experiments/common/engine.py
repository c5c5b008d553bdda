"""One run of an experiment: what is there is taken over, the rest is made, and a summary is written after each cell.

1. A `Design` names cells: settings as plain data, a function that makes each, its parent, attacks on it.
2. Numbers that stand in the summary file are restored, where the same settings make them.
3. `make_cells` does what is left, in any number of processes and on any number of commands.
4. Rows of the summary file that were not asked for stay, if the design's settings would make them.
5. `Design.summarize` says what the rows mean together; that goes to the summary files.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from experiments.common.cells import NUMBERS, Cell, CellStore, agree, plain, read_json, write_json
from experiments.common.making import make_cells, make_cells_in_processes
from experiments.common.progress import Display
from routed_peft.runs.records import RUN

Row = dict[str, Any]
"""One cell in a summary: what identifies it, its numbers, ``key`` (its directory), ``settings``, and ``attacks`` if any."""


class Design(ABC):
    """Cells of one experiment, and the sense of their numbers.

    Attributes:
        cells: in the order in which they are made and shown. Their parents need not be among them.
        attack_settings: see `Cell`; those of all cells.
        defaults: values of settings that were added later, for cells and summaries from before.
    """

    cells: Sequence[Cell]
    attack_settings: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}

    @abstractmethod
    def cell_of(self, row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Cell | None:
        """Return the cell of a row of a summary, asked for or not; None for one that cannot be made any more.

        Args:
            row: what identifies it.
            settings: those of the summary, for a row that does not say its own; by default the design's.
        """

    @abstractmethod
    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        """Return the content of a summary."""

    def read_summary(self, file: Path) -> dict[str, Any]:
        """Read a summary, of this version or an earlier one; ValueError where the file is something else."""
        content = read_json(file)
        if not isinstance(content, dict) or not {"settings", "cells"} <= content.keys():
            raise ValueError(f"{str(file)!r} is no summary of an experiment: name another file, or move it away")
        return content

    def rows(self, summary: Mapping[str, Any]) -> list[Row]:
        """Return the rows of a summary."""
        return list(summary["cells"])


class SummaryFile:
    """The summary of a design's cells, to be restored from and written.

    Args:
        design: the experiment.
        store: directories of its cells.
        file: the summary that rows are taken from; None for none.
        copies: files that get the same content.
    """

    def __init__(self, design: Design, store: CellStore, *, file: Path | None, copies: Sequence[Path] = ()) -> None:
        self.design, self.store, self.file, self.copies = design, store, file, copies

    def read(self) -> dict[str, Any]:
        """Return the summary that is there; an empty one where there is none."""
        if self.file is None or not self.file.exists():
            return {"settings": {}, "cells": []}
        return self.design.read_summary(self.file)

    def restore(self) -> None:
        """Take the numbers of cells from the summary where their directories lack them: on another machine, say.

        Attacks are taken if they were made as the design asks and on the same model; where one is missing, the model is
        needed and made again.
        """
        summary = self.read()
        known = sorted(self._rows_of_design(summary), key=lambda pair: len(pair[0].get("attacks", ())))
        comparable = not self._differing_attacks(summary)
        for cell in self.design.cells:
            # methods that make the same model share a cell; of their rows the one that was attacked most is the latest
            rows = [row for row, other in known if _same_model(cell, other)]
            if not rows:
                continue
            with suppress(Timeout), self.store.lock(cell):  # but for cells that another process is making anew
                folder, row = self.store.claim(cell), rows[-1]
                about = {*cell.row, "key", "settings", "attacks"}
                if not (folder / NUMBERS).exists():
                    write_json(folder / RUN, {"versions": summary.get("versions", {})})
                    write_json(folder / NUMBERS, {name: value for name, value in row.items() if name not in about})
                here = self.store.numbers(cell) or {}
                if not comparable or any(here.get(name) != row.get(name) for name in cell.fingerprint):
                    continue  # made anew, for a cell that needed its model, and not the same to the last bit
                for name, result in row.get("attacks", {}).items():
                    if not self.store.attack_file(cell, name)[1]:
                        self.store.write_attack(cell, name, result)

    def further_rows(self) -> list[tuple[Row, Cell]]:
        """Return the rows that are not asked for, but would be made by the same settings, with their cells.

        A sweep over some methods or seeds thus leaves the others where they are; what other settings made goes.

        Raises:
            ValueError: where these rows were attacked otherwise than the design asks.
        """
        summary = self.read()
        asked = [plain(cell.row) for cell in self.design.cells]
        rows = [(row, cell) for row, cell in self._rows_of_design(summary) if plain(cell.row) not in asked]
        odd = self._differing_attacks(summary)
        if odd and any(row.get("attacks") for row, _ in rows):
            name, then = next(iter(odd.items()))
            raise ValueError(
                f"`summary_file` {self.file} holds {len(rows)} rows that are not asked for, with `{name}` {then} "
                f"where {self.design.attack_settings[name]} is asked for now: name another file, or ask for all of them"
            )
        return rows

    def write(self, *, keep: bool = True) -> dict[str, Any]:
        """Write the numbers of all finished cells and, unless told otherwise, of `further_rows`; return the summary."""
        with FileLock(self.store.place / ".summary.lock"):
            made = [(row, cell) for cell in self.design.cells if (row := self._row(cell)) is not None]
            kept = [_updated(row, cell, made) for row, cell in self.further_rows()] if keep else []
            summary: dict[str, Any] = plain(self.design.summarize([*(row for row, _ in made), *kept]))
            for file in (*self.copies, *([self.file] if self.file else ())):
                write_json(file, summary)
        return summary

    def _row(self, cell: Cell) -> Row | None:
        numbers = self.store.numbers(cell)
        if numbers is None:
            return None
        attacks = {} if cell.attacks is None else {"attacks": self.store.attacks(cell)}
        return {**cell.row, **numbers, "key": self.store.claim(cell).name, "settings": plain(cell.settings), **attacks}

    def _rows_of_design(self, summary: Mapping[str, Any]) -> Iterator[tuple[Row, Cell]]:
        """Yield the rows that the design's settings would make, with their cells."""
        for row in self.design.rows(summary):
            cell = self.design.cell_of(row)
            then = row.get("settings")
            if then is None:
                former = self.design.cell_of(row, summary["settings"])
                then = former and former.settings
            if cell is not None and then is not None and agree(plain(cell.settings), plain(then), self.design.defaults):
                yield row, cell

    def _differing_attacks(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of attacks of which the summary has other values than the design."""
        about = {**self.design.defaults, **summary.get("experiment", {})}
        asked = plain(self.design.attack_settings)
        return {name: about[name] for name, now in asked.items() if name in about and about[name] != now}


def run_cells(summary: SummaryFile, console: Console, *, processes: int = 1) -> dict[str, Any]:
    """Make and attack all cells of a design that are not there yet; write the summary after each, and return it.

    Start it in as many processes as there is room for: a cell that one of them is at is left to it. Cells whose numbers
    stand in the summary already are not made again, even if their directories are gone.

    Args:
        summary: where numbers are taken from and go.
        console: where progress is shown.
        processes: how many cells at a time; 0 for as many as there are cores.

    Raises:
        ValueError: where the summary file is another, or of another version; at the end, where cells failed: which, and why.
    """
    cells, store = summary.design.cells, summary.store
    summary.further_rows()  # raises now rather than after the first cell
    summary.restore()
    processes = min(processes or os.cpu_count() or 1, sum(not store.is_done(cell) for cell in cells))
    with Display(console, len(cells), on_made=summary.write) as display:
        if processes <= 1:
            failed = make_cells(store, cells, display.tell)
        else:
            failed = make_cells_in_processes(store, cells, tell=display.tell, processes=processes)
    found = summary.write()
    if failed:
        reasons = "\n".join(f"  {name}, {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(cells)} cells failed; the others are in the summary:\n{reasons}")
    return found


def _same_model(one: Cell, other: Cell) -> bool:
    return one.name == other.name and plain(one.settings) == plain(other.settings)


def _updated(row: Row, cell: Cell, made: Sequence[tuple[Row, Cell]]) -> Row:
    """Return a row that was not asked for, with what is known now where another one has the same model."""
    same = next((new for new, other in made if _same_model(cell, other)), None)
    if same is None or len(same.get("attacks", ())) < len(row.get("attacks", ())):
        return row
    return same | dict(cell.row)
