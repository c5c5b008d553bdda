"""Benefit of a region to a row: by how much it lowers the row's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from routed_peft.ablation import ablated
from routed_peft.eval_mode import evaluating
from routed_peft.losses import token_losses
from routed_peft.routes import IGNORED


def benefit_threshold(forget: Tensor, retain: Tensor, kind: str = "balanced") -> float:
    r"""Return the benefit above which a row counts as forget.

    Forget rows differ among themselves more than retain rows do. The threshold is therefore "balanced": as
    many standard deviations below the mean of the former as above that of the latter,

    .. math:: t = \frac{\mu_f \sigma_r + \mu_r \sigma_f}{\sigma_f + \sigma_r},

    where normal distributions would err as often on either side. "median" puts the median in place of the mean and the median
    absolute deviation in place of the standard deviation, which a few wrong labels hardly move. "midpoint" is
    :math:`(\mu_f + \mu_r) / 2`.

    Args:
        forget: benefits of labelled forget rows, ``(N,)``, in nats per token.
        retain: benefits of labelled retain rows, ``(M,)``.
        kind: "balanced", "median" or "midpoint".

    Example:
        >>> forget, retain = torch.tensor([0.0, 2.0]), torch.tensor([-1.25, -0.75])
        >>> round(benefit_threshold(forget, retain), 2), benefit_threshold(forget, retain, "midpoint")
        (-0.6, 0.0)
    """
    (mu_f, above), (mu_r, below) = (middle_and_spread(side, kind) for side in (forget, retain))
    if kind == "midpoint" or 0 in (above, below):  # which says nothing of how far a side reaches
        above = below = 1.0
    return (mu_f * below + mu_r * above) / (above + below)


def middle_and_spread(values: Tensor, kind: str) -> tuple[float, float]:
    """Return mean and standard deviation, or "median" and median absolute deviation; of an even number the lower middle one.

    >>> middle_and_spread(torch.tensor([0.0, 1.0, 5.0]), "median")
    (1.0, 1.0)
    """
    values = values.double()
    if kind == "median":
        return float(values.median()), float((values - values.median()).abs().median())
    return float(values.mean()), float(values.std(correction=0))


@torch.no_grad()
def region_benefit(model: nn.Module, batch: dict[str, Tensor], regions: Sequence[str]) -> Tensor:
    """Return how much lower the loss is with the regions than without, ``(B, T - 1)``, in nats, at each token but the first.

    Args:
        model: with `regions`.
        batch: ``input_ids``, ``labels`` and ``attention_mask``, ``(B, T)``; other keys are left out.
        regions: their names.
    """
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    with evaluating(model):
        on = token_losses(model(**inputs).logits, batch["labels"].to(device))
        with ablated(model, *regions):
            off = token_losses(model(**inputs).logits, batch["labels"].to(device))
    return off - on


def row_means(values: Tensor, targets: Tensor) -> Tensor:
    """Return each row's mean, ``(B,)``, of `token_losses` or their differences over the targets that have a loss."""
    return values.sum(1) / (targets[:, 1:] != IGNORED).sum(1).clamp(min=1)
