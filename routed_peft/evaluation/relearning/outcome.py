"""What an attacker has by each step, from curves at every learning rate and seed, and whether it was an attack at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from routed_peft.evaluation.measures import WorstCase, within_utility, worst_case
from routed_peft.evaluation.measures.relearning import TOLERANCE, Losses, states_kept


@dataclass(frozen=True)
class Outcome:
    """What came of an attack.

    Attributes:
        envelope: for every step the lowest loss so far, see `worst_case`.
        retain: retain loss of the model that the attacker then has, the mean over seeds; NaN where it was not measured.
        interior: whether the learning rate of that model lies inside the grid, so that none beyond it would do better.
        useful: the envelope over states whose retain loss rose by 5 % at most; None where there is no such state.
        verdict: "attack"; or "no attack" where no rate lowered the loss by `TOLERANCE`, "diverged" where all of them diverged.
    """

    envelope: list[WorstCase]
    retain: list[float]
    interior: list[bool]
    useful: list[WorstCase] | None
    verdict: str

    @classmethod
    def of(
        cls,
        steps: Sequence[int],
        losses: Losses,
        retain: Losses,
        before: float,
        retain_before: float | None,
        statuses: set[str],
    ) -> Outcome:
        """Sum up curves.

        Args:
            steps: at which losses were taken, ascending from 0.
            losses: learning rate, ascending -> seed by seed -> loss that the attacker wants to lower, at every step.
            retain: likewise, on retain text.
            before: the loss before anything was done to the model.
            retain_before: on retain text; None where it was not measured.
            statuses: what became of every curve, see `Curve.status`.

        Example:
            >>> losses = {1e-3: [[5.0, 4.0, 3.5]], 1e-2: [[5.0, 3.0, 6.0]]}
            >>> retain = {1e-3: [[2.0, 2.0, 2.0]], 1e-2: [[2.0, 2.5, 4.0]]}
            >>> found = Outcome.of([0, 5, 20], losses, retain, 5.0, 2.0, {"attack"})
            >>> found.envelope[-1].mean, found.retain[-1], found.interior[-1], found.useful[-1].mean, found.verdict
            (3.0, 2.5, False, 3.5, 'attack')
        """
        rates = list(losses)
        envelope = worst_case(steps, losses)
        allowed = {} if retain_before is None else within_utility(retain, retain_before)
        possible = any(
            math.isfinite(curve[0]) for own in allowed.values() for curve in own
        )  # not where rounding spoilt it
        lowered = envelope[-1].mean < before - TOLERANCE
        return cls(
            envelope=envelope,
            retain=[_retain(case, steps, losses, retain) for case in envelope],
            interior=[case.at == 0 or rates[0] < case.learning_rate < rates[-1] for case in envelope],
            useful=worst_case(steps, losses, allowed) if possible else None,
            verdict="attack" if lowered else "diverged" if statuses == {"diverged"} else "no attack",
        )


def _retain(case: WorstCase, steps: Sequence[int], losses: Losses, retain: Losses) -> float:
    """Return the retain loss of the states that a worst case is of."""
    index, rate = steps.index(case.at), case.learning_rate
    pairs = zip(losses[rate], retain[rate], strict=True)
    return statistics.fmean(measured[states_kept(curve)[index]] for curve, measured in pairs)
