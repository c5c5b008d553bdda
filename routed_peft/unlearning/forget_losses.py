"""Forget losses by name: the table behind `UnlearningArguments.method`, and the hook that adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from routed_peft.routes import IGNORED
from routed_peft.unlearning.losses import npo, simnpo, squared_distance, token_log_probs, uniform_divergence


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model on B rows of T positions.

    Attributes:
        logits: ``(B, T, V)``, in float32 at least.
        hidden: activations of the steered block, ``(B, T, D)``; None unless the method steers activations.
        labels: ``(B, T)``, -100 where a token does not count.
        target: activation to which forget rows are steered, ``(D,)``; None unless the method steers activations.
    """

    logits: Tensor
    hidden: Tensor | None
    labels: Tensor
    target: Tensor | None = None

    def select(self, rows: Tensor) -> Outputs:
        """Return the outputs of the rows where ``rows`` ``(B,)`` is true."""
        hidden = None if self.hidden is None else self.hidden[rows]
        return Outputs(self.logits[rows], hidden, self.labels[rows], self.target)

    @property
    def counted(self) -> Tensor:
        """Positions that predict a token that counts, ``(B, T - 1)``."""
        return self.labels[:, 1:] != IGNORED

    def log_probs(self) -> Tensor:
        """Summed log-probability of each row, ``(B,)``."""
        return token_log_probs(self.logits, self.labels).sum(1)

    def predictions(self) -> Tensor:
        """Logits at the positions that count, ``(N, V)``."""
        return self.logits[:, :-1][self.counted]

    def activations(self) -> Tensor:
        """Activations at the positions that count, ``(N, D)``."""
        assert self.hidden is not None
        return self.hidden[:, :-1][self.counted]


ForgetFunction = Callable[[Outputs, Outputs | None, Any], Tensor]
"""``loss(outputs, reference, args)``: the values whose mean is minimized on forget rows.

``outputs`` are those of the trained model, ``reference`` those of the frozen original or None, ``args`` the
`UnlearningArguments` of the run. The values are summed, and divided by the tokens or rows of the whole optimizer step.
"""


@dataclass(frozen=True)
class ForgetLoss:
    """A forget loss and its needs.

    Attributes:
        function: see `ForgetFunction`.
        unit: unit of the mean, ``"tokens"`` or ``"rows"``.
        reads_reference: whether the frozen original is run on forget rows.
        uses_retain: whether the loss is joined by a retain term.
        steers: whether activations of a block are steered, as in RMU.
        beta: default of the argument ``beta``; None where the loss has no such parameter.
    """

    function: ForgetFunction
    unit: Literal["tokens", "rows"] = "tokens"
    reads_reference: bool = False
    uses_retain: bool = True
    steers: bool = False
    beta: float | None = None


FORGET_LOSSES: dict[str, ForgetLoss] = {}
"""Method name -> its forget loss; `register_forget_loss` adds to it."""


def register_forget_loss(name: str, loss: ForgetLoss | ForgetFunction) -> None:
    """Make a forget loss available as ``method`` of `UnlearningArguments`, recipes and command lines.

    A function alone is a loss whose mean over tokens is minimized beside a retain term.

    >>> register_forget_loss("flatten", lambda outputs, reference, args: outputs.predictions().std(-1))
    >>> FORGET_LOSSES.pop("flatten").unit
    'tokens'
    """
    loss = loss if isinstance(loss, ForgetLoss) else ForgetLoss(loss)
    if name in FORGET_LOSSES:
        raise ValueError(f"the forget loss {name!r} exists already: choose another name")
    if loss.unit not in ("tokens", "rows"):
        raise ValueError(f"`unit` of a forget loss must be 'tokens' or 'rows', got {loss.unit!r}")
    FORGET_LOSSES[name] = loss


_log_likelihood: ForgetFunction = lambda outputs, reference, args: token_log_probs(outputs.logits, outputs.labels)


def _npo(outputs: Outputs, reference: Outputs | None, args: Any) -> Tensor:
    assert reference is not None
    return npo(outputs.log_probs(), reference.log_probs(), args.beta)


def _simnpo(outputs: Outputs, reference: Outputs | None, args: Any) -> Tensor:
    return simnpo(outputs.log_probs(), outputs.counted.sum(1).clamp(min=1), beta=args.beta, margin=args.margin)


def _rmu(outputs: Outputs, reference: Outputs | None, args: Any) -> Tensor:
    assert outputs.target is not None
    return squared_distance(outputs.activations(), outputs.target)


register_forget_loss("gradient_ascent", ForgetLoss(_log_likelihood, uses_retain=False))
register_forget_loss("graddiff", ForgetLoss(_log_likelihood))
register_forget_loss("npo", ForgetLoss(_npo, unit="rows", reads_reference=True, beta=0.1))
register_forget_loss("simnpo", ForgetLoss(_simnpo, unit="rows", beta=2.5))
register_forget_loss("maxent", ForgetLoss(lambda outputs, reference, args: uniform_divergence(outputs.predictions())))
register_forget_loss("rmu", ForgetLoss(_rmu, steers=True))
