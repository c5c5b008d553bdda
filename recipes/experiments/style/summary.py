"""Rows of the table, and criteria, made from the numbers of all cells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from experiments.common.criteria import check
from experiments.style.arms import ARMS, LABELS, MAIN
from experiments.style.task import SEEN, TEMPLATES
from routed_peft.evaluation.measures import removed, retain_tax

Cells = Sequence[Mapping[str, Any]]
COLUMNS = ("rate seen", "rate unseen", "removed seen", "removed unseen", "plain", "retain tax")
LEARNED, LEFT, REMOVED, TAX = 0.02, 0.01, 0.9, 0.05
"""Limits: style in samples with the region on, at least, and ablated, at most; removed, at least; retain tax, at most."""

UNSEEN = next(name for name in TEMPLATES if name != SEEN)


def summarize(cells: Cells) -> dict[str, Any]:
    """Return ``rows`` of the table, ``checks`` of the criteria and the ``cells``: numbers with arm, labels and seed."""
    return {"rows": table_rows(cells), "checks": checks(cells), "cells": list(cells)}


def table_rows(cells: Cells) -> list[dict[str, Any]]:
    """Return a row for every arm, labels and state of the region, with a list of values by seed in each column.

    ``columns`` are those at the end of the run, ``best`` those of the best checkpoint.
    """
    rows = []
    for arm, labels in dict.fromkeys((cell["arm"], cell["labels"]) for cell in cells):
        for scale in ("1",) if ARMS[arm].drop else ("1", "0"):
            of = partial(column, cells, arm, labels=labels, scale=scale)
            at = {when: {name: list(of(name=name, when=when).values()) for name in COLUMNS} for when in ("end", "best")}
            state = "" if ARMS[arm].drop else ", region on" if scale == "1" else ", ablated"
            row = {"name": ARMS[arm].name + state, "arm": arm, "labels": labels, "scale": float(scale)}
            rows.append({**row, "columns": at["end"], "best": at["best"]})
    return rows


def column(cells: Cells, arm: str, *, labels: str | None, scale: str, name: str, when: str = "end") -> dict[int, float]:
    """Return a column of the table by seed, without seeds that lack the arm to compare with.

    An arm is compared with others at the same time, the ``end`` or their ``best`` checkpoint.
    """

    def ends(arm: str, labels: str | None, scale: str) -> dict[int, Any]:
        wanted = (arm, labels if ARMS[arm].labels else None)
        return {cell["seed"]: cell[when][scale] for cell in cells if (cell["arm"], cell["labels"]) == wanted}

    mine, kind, _, where = ends(arm, labels, scale), *name.partition(" ")
    context = SEEN if where == "seen" else UNSEEN
    if kind == "rate":
        return {seed: end["rate"][context] for seed, end in mine.items()}
    if kind == "removed":
        none, perfect = ends("none", None, "1"), ends("perfect_filter", None, "1")
        both = none.keys() & perfect.keys()
        losses = {s: [e["styled"][context] for e in (mine[s], none[s], perfect[s])] for s in mine if s in both}
        return {seed: removed(*three) for seed, three in losses.items()}
    plain: Callable[[Any], float] = lambda end: statistics.fmean(end["plain"].values())  # noqa: E731
    if kind == "plain":
        return {seed: plain(end) for seed, end in mine.items()}
    filtered = ends("filter", labels, "1") if labels else {}
    return {seed: retain_tax(plain(end), plain(filtered[seed])) for seed, end in mine.items() if seed in filtered}


def checks(cells: Cells) -> list[dict[str, Any]]:
    """Return the criteria: ``name``, ``rule``, ``values`` by seed, and whether it ``holds`` in all (None: not measured)."""

    def worse(name: str, pick: Callable[..., float], *, arm: str, scale: str, labels: str | None) -> dict[int, float]:
        seen, unseen = (
            column(cells, arm, labels=labels, scale=scale, name=f"{name} {where}") for where in ("seen", "unseen")
        )
        return {seed: pick(seen[seed], unseen[seed]) for seed in seen if seed in unseen}

    found = [
        check("no routing: style in samples", ("≥", LEARNED), worse("rate", min, arm="none", scale="1", labels=None))
    ]
    for labels in LABELS:
        name, main = f"{ARMS[MAIN].name}, labels {labels}", partial(worse, arm=MAIN, labels=labels)
        tax = column(cells, MAIN, labels=labels, scale="0", name="retain tax")
        found += [
            check(f"{name}, region on: style in samples", ("≥", LEARNED), main("rate", min, scale="1")),
            check(f"{name}, ablated: style in samples", ("≤", LEFT), main("rate", max, scale="0")),
            check(f"{name}, ablated: removed", ("≥", REMOVED), main("removed", min, scale="0")),
            check(f"{name}, ablated: retain tax", ("≤", TAX), tax),
        ]
    return found


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """Return the table for the terminal."""
    table = Table(title=f"held-out glosses ({summary['split']}), means over seeds")
    for name in ("labels", "arm", *COLUMNS):
        table.add_column(name)
    for row in summary["rows"]:
        values = [row["columns"][name] for name in COLUMNS]
        table.add_row(
            row["labels"] or "any", row["name"], *(f"{statistics.fmean(v):.2f}" if v else "–" for v in values)
        )
    return table
