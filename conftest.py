"""Markers of tests by the folder and the file that they are in; no garbage collection of what stays."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_sessionstart() -> None:
    """Import without garbage collection: a tenth of the time, for objects that stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage again, but leave out the million objects there are: `Trainer.train` collects at every call."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what belongs to experiments, and what trains in several processes."""
    for item in items:
        place = item.path.relative_to(ROOT)
        if "experiments" in place.parts:
            item.add_marker("experiments")
        if "distributed" in place.stem:
            item.add_marker("distributed")
