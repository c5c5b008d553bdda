"""A toy experiment for tests of the engine of cells: numbers instead of models, and a log of what was made."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common.cells import Cell, CellStore, Site
from experiments.common.engine import Design, Row, SummaryFile, run_cells

NAMES = ("one", "two", "three", "four")


@dataclass
class Toy(Design):
    """Cells called by words, each made from "root"; their number is that of their steps, or what a test adds."""

    names: Sequence[str] = NAMES
    settings: Mapping[str, Any] = field(default_factory=lambda: {"steps": 2})
    attacks: Sequence[str] = ()
    attack_settings: Mapping[str, Any] = field(default_factory=lambda: {"rate": 0.1})
    defaults: Mapping[str, Any] = field(default_factory=dict)
    make: Any = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.cells = [cell for name in self.names if (cell := self.cell_of({"name": name}))]

    def cell_of(self, row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Cell | None:
        if row["name"] == "forgotten":
            return None
        about = {**self.settings, **{k: v for k, v in (settings or {}).items() if k in self.settings}}
        run = self.make or partial(make, seconds=self.seconds)
        root = Cell("root", {"name": "root"}, about, partial(run, name="root"), "model")
        return Cell(
            row["name"],
            {"name": row["name"]},
            about,
            partial(run, name=row["name"]),
            "model",
            parent=root,
            attacks={name: partial(attack, name=name) for name in self.attacks} or None,
            attack_settings=self.attack_settings,
            fingerprint=("value",),
        )

    def summarize(self, rows: list[Row]) -> dict[str, Any]:
        return {"settings": self.settings, "experiment": self.attack_settings, "cells": rows}


def make(site: Site, name: str, seconds: float = 0.0) -> dict[str, Any]:
    assert name == "root" or (site.parent / "model").read_text() == "root"
    log(site, name)
    site.tick(1, 2)
    time.sleep(seconds)
    (site.folder / "model").write_text(name)
    (site.folder / "pid").write_text(str(os.getpid()))
    return {"value": len(name)}


def attack(site: Site, name: str) -> dict[str, Any]:
    log(site, f"{name} on {(site.folder / 'model').read_text()}")
    return {"loss": 1.0}


def log(site: Site, text: str) -> None:
    with (site.folder.parent / "log.txt").open("a") as file:
        file.write(f"{text}\n")


def made(place: Path) -> list[str]:
    """Return what was made, in order, and forget it."""
    file = place / "log.txt"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def run(design: Design, place: Path, file: Path | None = None, **how: Any) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=100)
    return run_cells(SummaryFile(design, CellStore(place, design.defaults), file=file), console, **how)


if __name__ == "__main__":
    run(Toy(seconds=float(sys.argv[2])), Path(sys.argv[1]), Path(sys.argv[1], "summary.json"))
