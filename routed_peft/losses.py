"""Losses of tokens, and the error where they diverge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from routed_peft.routes import IGNORED


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the loss of every token but the first, under the position before it: :math:`-\log p(x_{b,t+1} \mid x_{b,\le t})`.

    Args:
        logits: ``(B, T, V)``; computed with in float32 at least.
        targets: ``(B, T)``, token ids; -100 where there is no loss.

    Returns:
        ``(B, T - 1)`` in nats, 0 where there is no loss.

    Example:
        >>> token_losses(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
        tensor([[1.3863, 0.0000]])
    """
    predicted, wanted = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)), targets[:, 1:]
    losses = F.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(wanted)


class DivergedError(ValueError):
    """A training loss is no number any more."""


def check_finite(loss: Tensor, step: int) -> None:
    """Raise `DivergedError` unless the loss of a step is a number.

    >>> check_finite(torch.tensor(float("nan")), step=3)
    Traceback (most recent call last):
    ...
    routed_peft.losses.DivergedError: the loss is nan at step 3: nothing was saved since the last checkpoint. ...
    """
    if not torch.isfinite(loss):
        raise DivergedError(
            f"the loss is {float(loss)} at step {step}: nothing was saved since the last checkpoint. Lower the learning rate, "
            "add warm-up steps or clip (`max_grad_norm`)"
        )
