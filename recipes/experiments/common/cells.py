"""Cells of an experiment: one model each, made once, in a directory that is found again by its settings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock

from routed_peft import files

CELL, NUMBERS = "cell.json", "numbers.json"
_UNKNOWN = object()
Tick = Callable[[int, int], None]
"""Told the step that a cell is at, and the number of its steps."""


@dataclass(frozen=True)
class Site:
    """The place where a cell is made.

    Attributes:
        folder: its directory.
        parent: directory of the cell whose model it is made from; its own where there is none.
        tick: told each step.
    """

    folder: Path
    parent: Path
    tick: Tick


@dataclass(frozen=True)
class Cell:
    """One model of an experiment, with the numbers that are measured on it.

    Cells are sent to other processes: their functions must be those of modules, or partials of these.

    Attributes:
        name: opens the name of its directory. Cells of one name differ in nothing but settings.
        row: what identifies it in a summary, such as arm and seed.
        settings: all that its model depends on, as data that JSON can hold.
        make: fills the directory and returns the numbers.
        model: file or directory below the cell's, without which no other cell can be made from it, and nothing attack it.
        parent: the cell whose model it is made from.
        attacks: further measurements of its model by name, each in a file of its own; None where a summary has no such column.
        attack_settings: all that these depend on beside the model.
        fingerprint: numbers by which a model that was made again is recognized as the same.
        describe: line about the numbers, for the terminal.
    """

    name: str
    row: Mapping[str, Any]
    settings: Mapping[str, Any]
    make: Callable[[Site], Mapping[str, Any]]
    model: str
    parent: Cell | None = None
    attacks: Mapping[str, Callable[[Site], Any]] | None = None
    attack_settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: tuple[str, ...] = ()
    describe: Callable[[Mapping[str, Any]], str] | None = None


def agree(one: Any, other: Any, defaults: Mapping[str, Any] | None = None) -> bool:
    """Return whether two settings agree on the fields that both know, nested ones included.

    Args:
        one: settings.
        other: settings.
        defaults: values of fields that were added later, for settings from before.

    Example:
        >>> agree({"steps": 2, "arm": {"name": "a"}}, {"steps": 2, "seed": 0}), agree({"steps": 2}, {"steps": 3})
        (True, False)
        >>> agree({"steps": 2}, {"steps": 2, "noise": 0.5}, {"noise": 0.0})
        False
    """
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return bool(one == other)
    for name in one.keys() | other.keys():
        a, b = (settings.get(name, (defaults or {}).get(name, _UNKNOWN)) for settings in (one, other))
        if a is not _UNKNOWN and b is not _UNKNOWN and not agree(a, b, defaults):
            return False
    return True


def plain(content: Any) -> Any:
    """Return data as JSON holds it: lists for tuples, text for keys, null for numbers that are not finite.

    >>> plain({"losses": (1.0, float("nan"))})
    {'losses': [1.0, None]}
    """
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(file: Path, content: Any) -> None:
    """Write plain data, all of it or none."""
    files.write_json(file, plain(content), indent=1, allow_nan=False)


def read_json(file: Path) -> Any:
    """Return what a file holds; None where it is not there, or not any more: another process may make its cell anew."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


class CellStore:
    """The directories of cells below one place, which several experiments and processes may share.

    Args:
        place: directory; made if it is not there.
        defaults: see `agree`.
    """

    def __init__(self, place: Path, defaults: Mapping[str, Any] | None = None) -> None:
        self.place, self.defaults = place, dict(defaults or {})
        place.mkdir(parents=True, exist_ok=True)

    def find(self, cell: Cell) -> Path | None:
        """Return the directory of a cell, if it has one."""
        folder, there = self._search(self.place / cell.name, CELL, cell.settings)
        return folder if there else None

    def claim(self, cell: Cell) -> Path:
        """Return the directory of a cell, a new one if it has none."""
        with FileLock(self.place / ".claims.lock"):
            folder, there = self._search(self.place / cell.name, CELL, cell.settings)
            if not there:
                write_json(folder / CELL, {"settings": cell.settings})
        return folder

    def clear(self, cell: Cell) -> None:
        """Delete all that a cell's directory holds but its settings."""
        for path in self.claim(cell).iterdir():
            if path.name != CELL:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def lock(self, cell: Cell) -> FileLock:
        """Return the lock under which a cell is made; it raises `filelock.Timeout` at once where another process has it."""
        return FileLock(f"{self.claim(cell)}.lock", timeout=0)

    def numbers(self, cell: Cell) -> dict[str, Any] | None:
        """Return the numbers of a cell that is made; None before."""
        folder = self.find(cell)
        numbers: dict[str, Any] | None = read_json(folder / NUMBERS) if folder else None
        return numbers

    def attack_file(self, cell: Cell, name: str) -> tuple[Path, bool]:
        """Return the file of an attack with a cell's settings, and whether it is there."""
        return self._search(self.claim(cell) / f"attack-{name}.json", None, cell.attack_settings)

    def attacks(self, cell: Cell) -> dict[str, Any]:
        """Return the results of all attacks on a cell that are there."""
        files = {name: self.attack_file(cell, name) for name in cell.attacks or ()}
        return {name: about["result"] for name, (file, _) in files.items() if (about := read_json(file)) is not None}

    def write_attack(self, cell: Cell, name: str, result: Any) -> None:
        """Write the result of an attack."""
        write_json(self.attack_file(cell, name)[0], {"settings": cell.attack_settings, "result": result})

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell was measured, and attacked as its experiment asks."""
        return self.numbers(cell) is not None and all(self.attack_file(cell, name)[1] for name in cell.attacks or ())

    def has_model(self, cell: Cell) -> bool:
        """Return whether a cell's finished model lies in its directory, and not its numbers alone."""
        folder = self.find(cell)
        return folder is not None and (folder / NUMBERS).exists() and (folder / cell.model).exists()

    def _search(self, first: Path, file: str | None, settings: Mapping[str, Any]) -> tuple[Path, bool]:
        """Return the path that has agreeing settings in its file, or else one that is free, and whether it is there."""
        for number in count(1):
            path = (
                first if number == 1 else first.with_name(f"{first.name.removesuffix('.json')}_{number}{first.suffix}")
            )
            about = read_json(path / file if file else path)
            if about is None or agree(about["settings"], plain(settings), self.defaults):
                return path, about is not None
        raise AssertionError
