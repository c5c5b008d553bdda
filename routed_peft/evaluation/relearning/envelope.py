"""What an attacker has by each step, from curves at every learning rate and seed, and whether it was an attack at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routed_peft.evaluation.measures import WorstCase, within_utility, worst_case
from routed_peft.evaluation.measures.robustness import TOLERANCE, Losses, states_kept


@dataclass(frozen=True)
class State:
    """What the attacker has by one step.

    Attributes:
        case: the lowest loss so far, see `worst_case`.
        retain: retain loss of the model that has it, the mean over seeds; NaN where it was not measured.
        documents: between which the loss would lie in 95 of 100 draws of documents, either end the mean over seeds; NaN where
            that was not measured.
        interior: whether its learning rate lies inside the grid, so that none beyond it would do better.
    """

    case: WorstCase
    retain: float
    documents: tuple[float, float]
    interior: bool

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can say."""
        about = {"retain": self.retain, "documents": list(self.documents), "interior": self.interior}
        return self.case.as_dict() | about


@dataclass(frozen=True)
class Outcome:
    """What came of an attack.

    Attributes:
        envelope: a state for every step.
        useful: the same among states whose retain loss rose by 5 % at most; None where there is no such state.
        verdict: "attack"; or "no attack" where no rate lowered the loss by `TOLERANCE`, "diverged" where all of them diverged.
    """

    envelope: list[State]
    useful: list[State] | None
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
        bounds: tuple[Losses, Losses] | None = None,
    ) -> Outcome:
        """Sum up curves.

        Args:
            steps: at which losses were taken, ascending from 0.
            losses: learning rate, ascending -> seed by seed -> loss that the attacker wants to lower, at every step.
            retain: likewise, on retain text.
            before: the loss before anything was done to the model.
            retain_before: on retain text; None where it was not measured.
            statuses: what became of every curve, see `Curve.status`.
            bounds: like the losses, between which they would lie on other documents; None where nobody looked.

        Example:
            >>> losses = {1e-3: [[5.0, 4.0, 3.5]], 1e-2: [[5.0, 3.0, 6.0]]}
            >>> retain = {1e-3: [[2.0, 2.0, 2.0]], 1e-2: [[2.0, 2.5, 4.0]]}
            >>> found = Outcome.of([0, 5, 20], losses, retain, 5.0, 2.0, {"attack"})
            >>> last = found.envelope[-1]
            >>> last.case.mean, last.retain, last.interior, found.useful[-1].case.mean, found.verdict
            (3.0, 2.5, False, 3.5, 'attack')
        """
        rates = list(losses)

        def states(allowed: Losses | None = None) -> list[State]:
            return [
                State(
                    case,
                    retain=_there(case, steps, losses, retain),
                    documents=(math.nan, math.nan)
                    if bounds is None
                    else (_there(case, steps, losses, bounds[0]), _there(case, steps, losses, bounds[1])),
                    interior=case.at == 0 or rates[0] < case.learning_rate < rates[-1],
                )
                for case in worst_case(steps, losses, allowed)
            ]

        allowed = {} if retain_before is None else within_utility(retain, retain_before)
        # a model that rounding or perturbing leaves of no use has no such state
        useful = any(math.isfinite(curve[0]) for own in allowed.values() for curve in own)
        envelope = states()
        lowered = envelope[-1].case.mean < before - TOLERANCE
        return cls(
            envelope=envelope,
            useful=states(allowed) if useful else None,
            verdict="attack" if lowered else "diverged" if statuses == {"diverged"} else "no attack",
        )


def _there(case: WorstCase, steps: Sequence[int], losses: Losses, others: Losses) -> float:
    """Return what else was measured of the states that a worst case is of, the mean over seeds."""
    index, rate = steps.index(case.at), case.learning_rate
    pairs = zip(losses[rate], others[rate], strict=True)
    return statistics.fmean(measured[states_kept(curve)[index]] for curve, measured in pairs)
