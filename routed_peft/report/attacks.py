"""Results of a relearning attack on one model: its worst case over learning rates, beside other models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from routed_peft.evaluation.measures import Crossing, Spread


@dataclass(frozen=True)
class Relearning:
    """One attack on one condition, or on one checkpoint.

    Attributes:
        steps: at which losses were taken, ascending from 0.
        forget: lowest forget loss that the attacker has by each step, over seeds.
        retain: retain loss of the model that they then have, at the last step.
        useful: lowest forget loss by the last step among states whose retain loss rose by at most 5 %.
        verdict: "attack"; or "no attack" where no learning rate lowered the loss, "diverged" where all of them diverged; where
            seeds differ, "attack in 2 of 3 seeds, diverged in 1".
        interior: whether the best rate lies inside the grid in every seed, so that none beyond it would do better.
        learning_rates: all that were tried.
        best_rates: the best one by the last step, each once.
        recovery: steps until the never-unlearned model's forget loss is reached by the mean over seeds; None where that
            loss is not known.
        recovery_by_seed: the same in every seed.
        recovery_tokens: tokens of the attacker until then, where a checkpoint was attacked.
        halfway: steps until the mean over seeds is midway between never-unlearned model and perfect filter, both before any
            attack; None where these are not known. Reached by weaker attacks than a whole recovery.
        share_relearned: share of what was removed that the last step has brought back (`share_relearned`); None likewise,
            and where hardly anything was removed.
        reference: loss of the never-unlearned model before any attack, on the text that is scored; None where not known.
        area: normalised area under the relearning curve (`relearning_area`); None where there is nothing to compare with.
        documents: between which losses it would end with other documents of the same kind, in 95 of 100 bootstrap draws; None
            where that is not known.
        removed: at each step, with all three models under the same attack (`removed`); empty or None where not known.
    """

    steps: tuple[int, ...]
    forget: tuple[Spread, ...]
    retain: Spread | None
    useful: Spread | None
    verdict: str
    interior: bool
    learning_rates: tuple[float, ...]
    best_rates: tuple[float, ...]
    recovery: Crossing | None = None
    recovery_by_seed: tuple[Crossing, ...] = ()
    recovery_tokens: Crossing | None = None
    halfway: Crossing | None = None
    share_relearned: Spread | None = None
    reference: float | None = None
    area: Spread | None = None
    documents: tuple[float, float] | None = None
    removed: tuple[Spread | None, ...] = ()

    @property
    def attacked(self) -> bool:
        """Whether it was an attack at all, in some seed at least; else its numbers say nothing of robustness."""
        return self.verdict.startswith("attack")

    @property
    def in_every_seed(self) -> bool:
        """Whether it was an attack in every seed; else the mean over seeds is higher than what an attacker can reach."""
        return self.verdict == "attack"

    @property
    def recovery_range(self) -> tuple[Crossing, Crossing]:
        """The soonest and the latest seed; one that does not recover is the latest of all."""
        order = sorted(self.recovery_by_seed, key=lambda one: (one.relation == ">", one.at))
        return order[0], order[-1]


def spread(values: Iterable[float]) -> Spread | None:
    """Sum up those values that are numbers; None where there are none.

    >>> spread([1.0, float("nan")]), spread([])
    (Spread(mean=1.0, min=1.0, max=1.0, n=1), None)
    """
    found = [value for value in values if math.isfinite(value)]
    return Spread.from_values(found) if found else None


def from_summary(result: Mapping[str, Any]) -> Relearning:
    """Return one attack of a summary that ``routed-peft relearn`` wrote.

    Args:
        result: as `routed_peft.evaluation.relearning.summarize` returns it.
    """
    envelope = result["envelope"]
    count = len({curve["seed"] for curve in result["curves"]})
    recovery = result.get("recovery") or {}
    share, area = recovery.get("share"), result.get("area")
    steps, tokens = (
        found and Crossing(found["at"], found["relation"]) for found in map(recovery.get, ("steps", "tokens"))
    )
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
