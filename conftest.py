"""Markers of tests by the folder and the file that they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what belongs to experiments, and what trains in several processes."""
    for item in items:
        place = item.path.relative_to(ROOT)
        if "experiments" in place.parts:
            item.add_marker("experiments")
        if "distributed" in place.stem:
            item.add_marker("distributed")
