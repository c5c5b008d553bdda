"""Results of a relearning attack on one model: its worst case over learning rates, beside other models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from routed_peft.evaluation.measures import Crossing, Spread


@dataclass(frozen=True)
class Relearning:
    """One attack on one condition, or on one checkpoint; a result that is not known is None or empty."""

    steps: tuple[int, ...]  # at which losses were taken, ascending from 0
    forget: tuple[Spread, ...]  # lowest forget loss that the attacker has by each step, over seeds
    retain: Spread | None  # retain loss of the model that they then have, at the last step
    useful: Spread | None  # lowest forget loss among states whose retain loss rose by at most 5 %
    verdict: str  # "attack"; "no attack" where no learning rate lowered the loss; "diverged" where all of them diverged
    interior: bool  # the best rate lies inside the grid in every seed, so that none beyond it would do better
    learning_rates: tuple[float, ...]  # all that were tried
    best_rates: tuple[float, ...]  # the best one by the last step, each once
    recovery: Crossing | None = None  # steps until the mean over seeds has the never-unlearned model's forget loss
    recovery_tokens: Crossing | None = None  # tokens of the attacker until then
    share_relearned: Spread | None = None  # share of what was removed that the last step has brought back
    reference: float | None = None  # loss of the never-unlearned model before any attack, on the text that is scored
    area: Spread | None = None  # see `relearning_area`
    documents: tuple[float, float] | None = None  # confidence interval over documents, see `State.documents`

    @property
    def attacked(self) -> bool:
        """Whether it was an attack at all, in some seed at least; else its numbers say nothing of robustness."""
        return self.verdict.startswith("attack")


def spread(values: Iterable[float]) -> Spread | None:
    """Sum up those values that are numbers; None where there are none.

    >>> spread([1.0, float("nan")]), spread([])
    (Spread(mean=1.0, min=1.0, max=1.0, n=1), None)
    """
    found = [value for value in values if math.isfinite(value)]
    return Spread.from_values(found) if found else None


def from_summary(result: Mapping[str, Any]) -> Relearning:
    """Return one attack of a summary that ``routed-peft relearn`` wrote, from an entry of `summarize`."""
    envelope = result["envelope"]
    count = len({curve["seed"] for curve in result["curves"]})
    recovery = result.get("recovery") or {}
    share, area = recovery.get("share"), result.get("area")
    steps, tokens = (one and Crossing(one["at"], one["relation"]) for one in map(recovery.get, ("steps", "tokens")))
    last = envelope[-1]
    low, high = map(nan_if_none, last.get("documents") or (None, None))
    useful = result.get("useful", {}).get("envelope")
    return Relearning(
        steps=tuple(entry["step"] for entry in envelope),
        reference=result.get("reference"),
        forget=tuple(_entry(entry, count) for entry in envelope),
        retain=spread([nan_if_none(last["retain"])]),
        useful=_entry(useful[-1], count) if useful else None,
        verdict=result["verdict"],
        interior=result["interior"],
        learning_rates=tuple(float(rate) for rate in result["learning_rates"]),
        best_rates=(last["learning_rate"],),
        recovery=steps,
        recovery_tokens=tokens,
        share_relearned=None if share is None else Spread(share, share, share, count),
        area=None if area is None else Spread(area, area, area, count),
        documents=(low, high) if math.isfinite(low) and math.isfinite(high) else None,
    )


def _entry(entry: Mapping[str, Any], count: int) -> Spread:
    return Spread(entry["mean"], entry["min"], entry["max"], count)


def nan_if_none(value: float | None) -> float:
    """Return a loss of a JSON file, where None stands for NaN: JSON has no NaN, and not all writers keep it."""
    return math.nan if value is None else value
