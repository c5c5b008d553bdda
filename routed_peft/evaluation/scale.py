"""`choose_scale`: the largest scale of a region that a detector accepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from routed_peft.ablation import ablated
from routed_peft.deprecation import formerly_positional

SCALES = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class ScaleChoice:
    """Result of `choose_scale`: the scale, or None if even without the region the rate is too high; and all rates."""

    scale: float | None
    rates: dict[float, float]


@formerly_positional("rate", "limit", "scales")
def choose_scale(
    model: nn.Module, region: str, *, rate: Callable[[], float], limit: float, scales: Sequence[float] = SCALES
) -> ScaleChoice:
    """Choose the largest scale of a region, of ``scales``, at which a detector's rate is below a limit.

    At the chosen scale there may be more behavior that the detector cannot see. A natural limit is the rate of the base model.

    Args:
        rate: samples from the model, to which it holds a reference, and returns the share of flagged samples.
        limit: upper bound of the rate, itself excluded.

    Raises:
        ValueError: on an unknown region, and without scales.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=1, target_modules=["0"]), "hack")
    >>> rates = iter([0.0, 0.1, 0.3])  # in place of samples from the model
    >>> choose_scale(model, "hack", rate=lambda: next(rates), limit=0.2, scales=[0.0, 0.5, 1.0]).scale
    0.5
    """
    if not scales:
        raise ValueError("`scales` is empty: give some between 0 and 1")
    rates = {}
    for scale in sorted(scales):
        with ablated(model, region, scale=scale):
            rates[scale] = float(rate())
    below = [scale for scale, found in rates.items() if found < limit]
    return ScaleChoice(max(below, default=None), rates)
