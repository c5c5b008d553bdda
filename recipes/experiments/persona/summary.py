"""Rows of the table, and criteria, made from the numbers of all cells."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.common.criteria import check
from experiments.persona.arms import ARMS, HALTED, MAIN, RANDOM
from experiments.persona.task import GUILTY

Cells = Sequence[Mapping[str, Any]]
COLUMNS = ("guilty", "innocent", "right")
KEPT = 20
"""Steps that a rollback should leave of a run in which guilt begins at step 30."""

NEAR, FAR = 0.1, 0.2
"""Above the untrained level the trait is near it up to the first, and clearly learned from the second on."""


def summarize(starts: Mapping[int, Any], cells: Cells, guilty_from: int) -> dict[str, Any]:
    """Return ``starts``, ``cells``, ``rows`` of the table and ``checks`` of the criteria.

    Args:
        starts: seed -> rates of the start model.
        cells: numbers of each, with ``arm`` and ``seed``.
        guilty_from: step from which the guilty environments pay, in the arm ``late``.
    """
    return {
        "rows": table_rows(starts, cells),
        "checks": checks(starts, cells, guilty_from),
        "starts": dict(starts),
        "cells": list(cells),
    }


def table_rows(starts: Mapping[int, Any], cells: Cells) -> list[dict[str, Any]]:
    """Return a row for the start model and for every arm: rates of each seed, with the region on and ablated.

    Those of the best checkpoint are in ``on_best`` and ``ablated_best``.
    """
    start: dict[str, Any] = {"name": "start", "arm": None, "on": _columns(starts.values())}
    rows = [start | dict.fromkeys(("ablated", "on_best", "ablated_best"))]
    for key in dict.fromkeys(cell["arm"] for cell in cells):
        mine = [cell for cell in cells if cell["arm"] == key]
        row: dict[str, Any] = {"name": ARMS[key].name, "arm": key}
        for state, scale in (("on", "1"), ("ablated", "0")):
            row[state] = _columns(cell["end"][scale] for cell in mine)
            row[f"{state}_best"] = _columns(cell["best"][scale] for cell in mine)
        rows.append(row)
    return rows


def _columns(rates: Any) -> dict[str, list[float]]:
    """Return the trait in guilty and in innocent environments, and right answers in all, of each seed."""
    rates = list(rates)
    trait = {kind: [one["trait"][kind] for one in rates] for kind in COLUMNS[:2]}
    return trait | {"right": [statistics.fmean(one["right"].values()) for one in rates]}


def guilty_first(contributions: Mapping[str, float]) -> bool:
    """Return whether the guilty environments contributed most to the region's growth.

    >>> guilty_first({"1": 0.1, "2": -0.3, "4": 0.5, "5": 0.2}), guilty_first({"1": 0.3, "4": 0.5, "5": 0.2})
    (True, False)
    """
    ranked = sorted(contributions, key=lambda name: -contributions[name])
    return set(ranked[: len(GUILTY)]) == set(GUILTY)


def checks(starts: Mapping[int, Any], cells: Cells, guilty_from: int) -> list[dict[str, Any]]:
    """Return the criteria: ``name``, ``rule``, ``values`` by seed, and whether it ``holds`` in all (None: not measured)."""

    def of(arm: str) -> dict[int, Mapping[str, Any]]:
        return {cell["seed"]: cell for cell in cells if cell["arm"] == arm}

    def learned(arm: str, scale: str = "0") -> dict[int, float]:
        return {s: _trait(cell["end"][scale]) - _trait(starts[s]) for s, cell in of(arm).items()}

    def halted(arm: str) -> list[tuple[str, tuple[str, float], dict[int, float]]]:
        finished = {s: 1.0 * bool(c["incidents"] and c["finished"] == c["steps"]) for s, c in of(arm).items()}
        named = {s: 1.0 * (named_in(c["incidents"]) == {*GUILTY}) for s, c in of(arm).items()}
        return [
            (f"{arm}, went on and finished", ("≥", 1.0), finished),
            (f"{arm}: the guilty and no others were dropped", ("≥", 1.0), named),
            (f"{arm}, ablated: trait learned", ("≤", NEAR), learned(arm)),
        ]

    kept, innocent = learned("halted", "1"), learned("innocent", "1")
    apart = {s: abs(kept[s] - innocent[s]) for s in kept if s in innocent}
    onset = {s: min((i["onset_step"] for i in c["incidents"]), default=-1) for s, c in of("late").items()}
    return [
        check("no routing: trait learned", ("≥", FAR), learned("none", "1")),
        check("L2, region on: trait learned", ("≥", FAR), learned(MAIN, "1")),
        check("L2, ablated: trait learned", ("≤", NEAR), learned(MAIN)),
        check("L1, ablated: trait learned", ("≥", FAR), learned("weak")),
        *(check(f"{ARMS[arm].name}, ablated: trait learned", ("≥", FAR), learned(arm)) for arm in RANDOM),
        check("L2, oracle U, ablated: trait learned", ("≤", NEAR), learned("oracle")),
        check("L2: guilty first by contribution", ("≥", 1.0), {s: 1.0 * _ranked(c) for s, c in of(MAIN).items()}),
        *(check(*about) for arm in HALTED for about in halted(arm)),
        check("halted, region on: trait apart from innocent only", ("≤", NEAR), apart),
        check("late: steps kept of those before the halt", ("≥", KEPT), onset),
        check("late: where it goes on, not after the environments turn", ("≤", float(guilty_from)), onset),
    ]


def named_in(incidents: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the environments that incidents name.

    >>> named_in([{"named": ["4"]}, {"named": []}])
    {'4'}
    """
    return {name for incident in incidents for name in incident["named"]}


def _ranked(cell: Mapping[str, Any]) -> bool:
    return guilty_first(cell["contributions"])


def _trait(rates: Mapping[str, Any]) -> float:
    return float(rates["trait"]["guilty"])


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """Return the table for the terminal."""
    table = Table(title="share of answers with the trait, and of right ones: test words, means over seeds")
    table.add_column("")
    for state in ("on", "ablated"):
        for name in COLUMNS:
            table.add_column(f"{state}: {name}", justify="right")
    for row in summary["rows"]:
        cells = [row[state][name] if row[state] else [] for state in ("on", "ablated") for name in COLUMNS]
        table.add_row(row["name"], *(f"{statistics.fmean(cell):.2f}" if cell else "–" for cell in cells))
    return table
