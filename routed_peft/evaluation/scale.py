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
    """Result of `choose_scale`.

    Attributes:
        scale: the chosen one; None if the rate is not below the limit even without the region.
        rates: scale -> rate of the detector.
    """

    scale: float | None
    rates: dict[float, float]


@formerly_positional("rate", "limit", "scales")
def choose_scale(
    model: nn.Module, region: str, *, rate: Callable[[], float], limit: float, scales: Sequence[float] = SCALES
) -> ScaleChoice:
    """Choose the largest scale of a region at which a detector's rate is below a limit.

    The region's contribution is multiplied by each scale in turn (`ablated`), and ``rate`` is measured. At the chosen scale
    there may be more behavior that the detector cannot see. A natural limit is the rate of the base model.

    Args:
        model: as for `ablated`.
        region: adapter name.
        rate: samples from the model, to which it holds a reference, and returns the share of flagged samples.
        limit: upper bound of the rate, itself excluded.
        scales: to try.

    Raises:
        ValueError: on an unknown region, and without scales.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=1, target_modules=["0"]), "hack")
        >>> layer = model.get_base_model()[0]
        >>> _ = nn.init.ones_(layer.lora_A["hack"].weight), nn.init.ones_(layer.lora_B["hack"].weight)
        >>> rest = layer.base_layer(torch.ones(1, 1)).item()
        >>> choose_scale(model, "hack", rate=lambda: round(model(torch.ones(1, 1)).item() - rest, 3), limit=2.0).scale
        0.2
    """
    if not scales:
        raise ValueError("`scales` is empty: give some between 0 and 1")
    rates = {}
    for scale in sorted(scales):
        with ablated(model, region, scale=scale):
            rates[scale] = float(rate())
    below = [scale for scale, found in rates.items() if found < limit]
    return ScaleChoice(max(below, default=None), rates)
