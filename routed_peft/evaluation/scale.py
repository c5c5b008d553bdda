"""How much of a region to deploy: all, none, or as much as a detector lets pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from routed_peft.ablation import ablated

SCALES = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class ScaleChoice:
    """What `choose_scale` found.

    Attributes:
        scale: the chosen one; None where even without the region the rate is not below the limit.
        rates: scale -> rate of the detector.
    """

    scale: float | None
    rates: dict[float, float]


def choose_scale(
    model: nn.Module, region: str, *, rate: Callable[[], float], limit: float, scales: Sequence[float] = SCALES
) -> ScaleChoice:
    """Choose the largest scale of a region at which a detector's rate is below a limit.

    The region's contribution is multiplied by each scale in turn (`ablated`), and ``rate`` is measured. The detector sees
    what it can see: at the chosen scale there may be more of what it cannot. A natural limit is the rate of the base model.

    Args:
        model: as for `ablated`.
        region: adapter name.
        rate: samples from the model, which it holds itself, and returns the share of flagged samples.
        limit: the rate must be below it.
        scales: to try.

    Raises:
        ValueError: on an unknown region, and if there are no scales.

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
