"""Rows of the table, and criteria, made from the numbers of all cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.access.arms import ARMS, CORE, MAIN
from experiments.common.criteria import check, mean_range
from routed_peft.evaluation.measures import recovered, removed

Cells = Sequence[Mapping[str, Any]]
COLUMNS = ("removed", "recovered", "recovered, all on", "tax", "core, one on", "core, all on", "leak", "compute")
LIMITS = {
    "removed": ("≥", 0.97),
    "recovered": ("≥", 0.97),
    "recovered, all on": ("≥", 0.95),
    "tax": ("≤", 0.02),
    "core, one on": ("≤", 0.05),
    "core, all on": ("≤", 0.05),
    "leak": ("≤", 0.05),
    "compute": ("≤", 1.15),
}
"""Goals of the arm `MAIN`; see `columns_of` for what they mean."""


def summarize(cells: Cells) -> dict[str, Any]:
    """Return ``rows`` of the table, ``checks`` of the criteria and the ``cells``: numbers with arm and seed."""
    arms = [arm for arm in ARMS if any(cell["arm"] == arm for cell in cells)]
    by_arm = {arm: columns_by_seed(cells, arm) for arm in arms}
    rows = [
        {
            "arm": arm,
            "name": ARMS[arm].name,
            "columns": {name: list(values.values()) for name, values in columns.items()},
        }
        for arm, columns in by_arm.items()
    ]
    main = by_arm.get(MAIN, {})
    checks = [check(f"{ARMS[MAIN].name}: {name}", LIMITS[name], main.get(name, {})) for name in COLUMNS]
    return {"rows": rows, "checks": checks, "cells": list(cells)}


def columns_by_seed(cells: Cells, arm: str) -> dict[str, dict[int, float]]:
    """Return column -> seed -> value, for the seeds at which the models to compare with are there."""
    found = {(cell["arm"], cell["seed"]): cell for cell in cells}
    columns: dict[str, dict[int, float]] = {name: {} for name in COLUMNS}
    for (key, seed), cell in found.items():
        others = [found.get((other, seed)) for other in ("dense", "core_only")]
        if key != arm or None in others:
            continue
        for name, value in columns_of(cell, *others).items():  # type: ignore[arg-type]
            if math.isfinite(value):  # where there is nothing to remove, no share of it is defined
                columns[name][seed] = value
    return columns


def columns_of(cell: Mapping[str, Any], dense: Mapping[str, Any], filtered: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one model beside the dense one and the perfect filter, those that it has.

    *removed* and *recovered* are means over topics, with no region on, and with the topic's own or all of them on. *tax*:
    loss on the core with no region on, minus the filter's. *core*: what switching regions on costs there, at worst. *leak*:
    by how much a region lowers the loss on another's topic, at worst. All losses in nats per token. *compute* as a multiple
    of the dense model's.
    """
    losses, (everything,), none = cell["losses"], dense["losses"].values(), filtered["losses"]["none"]
    topics = [name for name in everything if name != CORE]
    numbers = {"compute": cell["ledger"]["flops"] / dense["ledger"]["flops"]}
    if "none" in losses:
        off = losses["none"]
        numbers["tax"] = off[CORE] - none[CORE]
        numbers["removed"] = statistics.fmean(removed(off[t], dense=everything[t], perfect=none[t]) for t in topics)
    ends = {"recovered": topics, "recovered, all on": ["+".join(topics)] * len(topics)}
    for name, subsets in ends.items():
        pairs = [(topic, subset) for topic, subset in zip(topics, subsets, strict=True) if subset in losses]
        if pairs and len(losses) > 1:
            off = losses.get("none", none)
            shares = [recovered(off[topic], losses[subset][topic], everything[topic]) for topic, subset in pairs]
            numbers[name] = statistics.fmean(shares)
    if "none" in losses and len(losses) > 1:
        off = losses["none"]
        numbers["core, one on"] = max(losses[topic][CORE] - off[CORE] for topic in topics)
        numbers["core, all on"] = losses["+".join(topics)][CORE] - off[CORE]
        leaks = [off[other] - losses[topic][other] for topic in topics for other in topics if other != topic]
        numbers["leak"] = max(leaks, default=0.0)
    return numbers


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """Return the table for the terminal."""
    table = Table(title=f"{summary['split']} text, means over seeds; losses in nats per token", padding=0)
    for name in ("arm", *COLUMNS):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=name == "arm")
    for row in summary["rows"]:
        table.add_row(row["arm"], *(mean_range(row["columns"][name]) for name in COLUMNS))
    return table
