"""From what was measured to what it says: the rows of the table, way and tax, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from routed_peft.evaluation.measures import tax, way

Row = dict[str, Any]
ROWS = {
    "no_routing": "no routing",
    "placebo": "no routing, extra units removed",
    "filter": "filter, same labels",
    "routed_on": "routed, region on",
    "routed": "routed, region ablated",
    "perfect_filter": "perfect filter",
}
"""The models measured, by key; an arm's key is its final model, the one that is attacked."""


def derive(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return way and tax, before and after relearning, of the routed arm and of the filter with the same labels.

    Args:
        models: key of `ROWS` -> its numbers: ``forget_loss``, ``retain_loss``, ``relearned`` (step -> forget loss), …
    """

    def covered(key: str, step: int | None = None) -> float:
        losses = [
            models[arm]["forget_loss"] if step is None else models[arm]["relearned"][step]
            for arm in (key, "no_routing", "perfect_filter")
        ]
        return way(*losses)

    attacked = [step for step in models["routed"]["relearned"] if step]
    return {
        "way": covered("routed"),
        "tax": tax(models["routed"]["retain_loss"], models["filter"]["retain_loss"]),
        "way_relearned": {step: covered("routed", step) for step in attacked},
        "way_filter": covered("filter"),
        "way_filter_relearned": {step: covered("filter", step) for step in attacked},
    }


def percent(share: float) -> str:
    """Write a share as a percentage.

    >>> percent(0.756), percent(float("nan"))
    ('76 %', 'not measurable')
    """
    return "not measurable" if math.isnan(share) else f"{100 * share:.0f} %"


def verdict(derived: Mapping[str, Any]) -> str:
    """Say in one sentence what came out.

    >>> verdict({"way": 0.75, "way_filter": 0.08, "tax": 0.104})
    'With half of the labels missing, routing and ablating went 75 % of the way from a model that knows biology to one
    that never saw it (filtering by the same labels: 8 %), and cost 0.10 nats per token of other text.'
    """
    cost = derived["tax"]
    price = f"cost {cost:.2f}" if cost >= 0 else f"gained {-cost:.2f}"
    if math.isnan(derived["way"]):
        return (
            "Too little was learnt to tell: the perfect filter's loss on biology is not above that without routing, so "
            f"there is no way to measure. Routing and ablating {price} nats per token of other text."
        )
    return (
        f"With half of the labels missing, routing and ablating went {percent(derived['way'])} of the way from a model "
        f"that knows biology to one that never saw it (filtering by the same labels: {percent(derived['way_filter'])}), "
        f"and {price} nats per token of other text."
    )


def terminal_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table for the terminal: what a person can read in ten seconds."""
    last = max(models["routed"]["relearned"])
    table = Table(title="held-out loss, nats per token", caption="high on biology and low on the rest is the aim")
    table.add_column("")
    for name in ("biology", f"… after {last} relearning steps", "other text"):
        table.add_column(name, justify="right")
    for key in ("no_routing", "filter", "routed", "perfect_filter"):
        numbers = models[key]
        cells = (numbers["forget_loss"], numbers["relearned"][last], numbers["retain_loss"])
        table.add_row(ROWS[key], *(f"{cell:.2f}" for cell in cells), style="bold" if key == "routed" else None)
    return table
