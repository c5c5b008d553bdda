"""Pass criteria of experiments, and their table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from routed_peft.evaluation.measures import Spread


def check(name: str, rule: tuple[str, float], values: Mapping[int, float]) -> dict[str, Any]:
    """Return a criterion, and whether the values of all seeds keep its rule; None where there is no value.

    >>> check("loss", ("≤", 1), {0: 0.5})
    {'name': 'loss', 'rule': '≤ 1.00', 'values': {0: 0.5}, 'holds': True}
    """
    sign, limit = rule
    compare = {"≥": lambda v: v >= limit, "≤": lambda v: v <= limit, ">": lambda v: v > limit}[sign]
    holds = all(compare(value) for value in values.values()) if values else None
    return {"name": name, "rule": f"{sign} {limit:.2f}", "values": dict(values), "holds": holds}


def mean_range(values: Sequence[float]) -> str:
    """Write a mean, with its range where there are several seeds.

    >>> mean_range([0.25, 0.75]), mean_range([0.25]), mean_range([])
    ('0.50 (0.25–0.75)', '0.25', '–')
    """
    if len(values) > 1:
        return str(Spread.from_values(values))
    return f"{values[0]:.2f}" if values else "–"


def terminal_checks(summary: Mapping[str, Any]) -> Table:
    """Return the criteria for the terminal."""
    table = Table(title="criteria, seed by seed")
    for name in ("", "limit", "found", "holds"):
        table.add_column(name, justify="left" if not name else "right")
    for check in summary["checks"]:
        values = "  ".join(f"{value:.2f}" for value in check["values"].values()) or "not measured"
        table.add_row(check["name"], check["rule"], values, {True: "yes", False: "NO", None: "–"}[check["holds"]])
    return table
