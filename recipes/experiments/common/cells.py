"""Cells of an experiment: one model each, made once, in a directory that is found again by its settings."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from glob import escape
from itertools import chain, count
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
        name = escape(cell.name)
        found = chain(self.place.glob(f"{name}/{CELL}"), sorted(self.place.glob(f"{name}_[0-9]*/{CELL}")))
        file = self._agreeing(found, cell.settings)
        return file and file.parent

    def claim(self, cell: Cell) -> Path:
        """Return the directory of a cell, a new one if it has none."""
        with FileLock(self.place / ".claims.lock"):
            folder = self.find(cell)
            if folder is None:
                folder = _first_free(self.place / cell.name)
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

    def attack_file(self, cell: Cell, name: str) -> Path | None:
        """Return the file of an attack on a cell, if it was made with the same settings."""
        folder = self.find(cell)
        if folder is None:
            return None
        stem = f"attack-{escape(name)}"
        found = chain(folder.glob(f"{stem}.json"), sorted(folder.glob(f"{stem}_[0-9]*.json")))
        return self._agreeing(found, cell.attack_settings)

    def attacks(self, cell: Cell) -> dict[str, Any]:
        """Return the results of all attacks on a cell that are made."""
        found = {name: self.attack_file(cell, name) for name in cell.attacks or ()}
        return {name: read_json(file)["result"] for name, file in found.items() if file}

    def write_attack(self, cell: Cell, name: str, result: Any) -> None:
        """Write the result of an attack."""
        file = _first_free(self.claim(cell) / f"attack-{name}.json")
        write_json(file, {"settings": cell.attack_settings, "result": result})

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell was measured, and attacked as its experiment asks."""
        return self.numbers(cell) is not None and all(self.attack_file(cell, name) for name in cell.attacks or ())

    def has_model(self, cell: Cell) -> bool:
        """Return whether a cell's finished model lies in its directory, and not its numbers alone."""
        folder = self.find(cell)
        return folder is not None and (folder / NUMBERS).exists() and (folder / cell.model).exists()

    def _agreeing(self, found: Iterable[Path], settings: Mapping[str, Any]) -> Path | None:
        wanted = plain(settings)
        for file in found:
            about = read_json(file)
            if about is not None and agree(about["settings"], wanted, self.defaults):
                return file
        return None


def _first_free(path: Path) -> Path:
    """Return a path that is free: the one given, or one with a number after its stem."""
    if not path.exists():
        return path
    stem = path.name.removesuffix(".json")
    names = (f"{stem}_{number}{path.name[len(stem) :]}" for number in count(2))
    return next(free for name in names if not (free := path.with_name(name)).exists())
