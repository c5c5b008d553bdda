"""Token losses, and the error that stops a diverged run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from routed_peft.routes import IGNORED

_ADVICE = "Lower the learning rate, add warm-up steps or clip (`max_grad_norm`)"


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the loss of every token but the first, under the position before it: :math:`-\log p(x_{b,t+1} \mid x_{b,\le t})`.

    As `target_losses`, for the tokens themselves, ``(B, T)``. The losses are ``(B, T - 1)``.

    >>> token_losses(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
    tensor([[1.3863, 0.0000]])
    """
    return target_losses(logits[:, :-1], targets[:, 1:])


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Return the loss of the target of every position: :math:`-\log p(y_{b,t} \mid x_{b,\le t})`.

    Args:
        logits: ``(B, T, V)``; the computation is in float32 or better.
        targets: ``(B, T)``, the token that follows each position; -100 for positions without a loss.

    Returns:
        ``(B, T)`` in nats, 0 for positions without a loss.

    >>> target_losses(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
    tensor([[1.3863, 0.0000]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets)


class DivergedError(ValueError):
    """A training loss that is not finite."""


def check_finite(loss: Tensor, step: int) -> None:
    """Raise `DivergedError` unless the loss of a step is finite."""
    if not torch.isfinite(loss):
        raise DivergedError(f"the loss is {float(loss)} at step {step}: nothing was saved since the last checkpoint. "
                            f"{_ADVICE}")  # fmt: skip


def check_finite_weights(weights: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise `DivergedError` unless all ``weights``, by name, are finite after a step; of sharded ones, those that are here.

    >>> check_finite_weights({"head": torch.tensor([1.0, float("inf")])}.items(), step=3)
    Traceback (most recent call last):
    ...
    routed_peft.losses.DivergedError: weights are not finite after step 3, such as 'head', ...
    """
    for name, weight in weights:
        here: Any = weight.detach()
        here = here.to_local() if hasattr(here, "to_local") else here
        if not torch.isfinite(here).all():
            raise DivergedError(f"weights are not finite after step {step}, such as {name!r}, so the model is not "
                                f"saved. {_ADVICE}")  # fmt: skip
