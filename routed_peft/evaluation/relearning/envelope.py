"""`Envelope`: the worst case of an attack by each step, over all learning rates and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from routed_peft.evaluation.measures import WorstCase, within_utility, worst_case
from routed_peft.evaluation.measures.robustness import TOLERANCE, Losses, kept_states


@dataclass(frozen=True)
class State:
    """The attacker's best model by one step; NaN where a loss was not measured."""

    case: WorstCase  # the lowest loss so far
    retain: float  # retain loss of that model, the mean over seeds
    documents: tuple[
        float, float
    ]  # 95 % confidence interval of the loss over documents, either end the mean over seeds
    interior: bool  # its learning rate lies inside the grid, so that no rate beyond would do better

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self.case) | {"retain": self.retain, "documents": list(self.documents), "interior": self.interior}


@dataclass(frozen=True)
class Envelope:
    """The worst case of an attack.

    Its verdict is "attack"; "no attack" where no rate lowered the loss by `TOLERANCE`; "diverged" where all rates diverged.
    """

    states: list[State]  # one for every step
    useful: list[State] | None  # the same among states with a retain loss at most 5 % above the start; None without any
    verdict: str

    @classmethod
    def from_losses(
        cls,
        steps: Sequence[int],
        losses: Losses,
        *,
        retain: Losses,
        before: float,
        retain_before: float | None,
        statuses: set[str],
        bounds: tuple[Losses, Losses] | None = None,
    ) -> Envelope:
        """Summarize curves: losses of the attacker's target and of retain text, and ends of intervals over documents.

        ``before`` and ``retain_before`` are losses of the original model, ``statuses`` those of all curves.

        >>> losses = {1e-3: [[5.0, 4.0, 3.5]], 1e-2: [[5.0, 3.0, 6.0]]}
        >>> retain = {1e-3: [[2.0, 2.0, 2.0]], 1e-2: [[2.0, 2.5, 4.0]]}
        >>> found = Envelope.from_losses(
        ...     [0, 5, 20], losses, retain=retain, before=5.0, retain_before=2.0, statuses={"attack"}
        ... )
        >>> last = found.states[-1]
        >>> last.case.mean, last.retain, last.interior, found.useful[-1].case.mean, found.verdict
        (3.0, 2.5, False, 3.5, 'attack')
        """
        rates = list(losses)

        def state(case: WorstCase) -> State:
            low, high = (
                math.nan if bounds is None else _at(case, steps, losses=losses, others=bounds[end]) for end in (0, 1)
            )
            inside = case.at == 0 or rates[0] < case.learning_rate < rates[-1]
            return State(case, _at(case, steps, losses=losses, others=retain), (low, high), inside)

        states = [state(case) for case in worst_case(steps, losses)]
        allowed = {} if retain_before is None else within_utility(retain, retain_before)
        # rounding or perturbing may leave no useful state at all
        useful = any(math.isfinite(curve[0]) for own in allowed.values() for curve in own)
        lowered = states[-1].case.mean < before - TOLERANCE
        return cls(
            states=states,
            useful=[state(case) for case in worst_case(steps, losses, allowed)] if useful else None,
            verdict="attack" if lowered else "diverged" if statuses == {"diverged"} else "no attack",
        )


def _at(case: WorstCase, steps: Sequence[int], *, losses: Losses, others: Losses) -> float:
    """Return another score of the models of a worst case, the mean over seeds."""
    index, rate = steps.index(case.at), case.learning_rate
    pairs = zip(losses[rate], others[rate], strict=True)
    return statistics.fmean(measured[kept_states(curve)[index]] for curve, measured in pairs)
