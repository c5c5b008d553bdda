"""The method in three functions: forward passes left as they are, backward passes with one weight per position.

Gradient routing (Cloud et al., arXiv 2410.04332) multiplies the gradient along chosen edges of the graph by a
data-dependent weight ``m``: 1 passes it, 0 blocks it, a negative weight reverses it.

Shapes: ``B`` examples, ``T`` positions, ``D`` features in, ``O`` features out. ``m`` is ``(B,)``, one weight per
example, or ``(B, T)``, one per position, and lines up with the leading axes of the tensor that it weighs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def spread(m: Tensor, like: Tensor) -> Tensor:
    """Give ``m`` trailing axes of size one, and the dtype of ``like``, so that it broadcasts against it from the left.

    >>> spread(torch.ones(2, 3), torch.ones(2, 3, 4, 5)).shape
    torch.Size([2, 3, 1, 1])
    """
    return m.reshape(m.shape + (1,) * (like.dim() - m.dim())).to(like.dtype)


_GATHER_FROM = 0.25
"""Share of zero weights from which copying the other positions costs less than multiplying them all."""

_MOST_RUNS = 8
"""With more runs than this, adding up their products costs more than copying."""

Runs = tuple[tuple[int, int, float], ...]
Taken = tuple[Tensor, int, bool, Tensor]
"""An input, its version then, whether its rows were weighed, and the rows that were taken of it."""


@dataclass(frozen=True, slots=True)
class PositionWeights:
    """Weights ``m`` made ready for many layers: which positions are kept, and by how much each is weighed.

    Attributes:
        m: ``(B,)`` or ``(B, T)``.
        index: flat indices of the positions whose weight is not zero, or None to keep all positions.
        kept: the weights of the positions kept, flat, or None where all of these are one.
        runs: runs of one weight other than zero, as flat (start, stop, weight), where they are few: no copy is needed then.
        last: what was last taken of an input, for layers side by side that read the same one; at most one entry.
    """

    m: Tensor
    index: Tensor | None
    kept: Tensor | None
    runs: Runs | None = None
    last: list[Taken] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, m: Tensor, gather: bool = True) -> PositionWeights:
        """Prepare ``m``. With ``gather``, positions of weight zero are left out of weight-gradient matmuls if they are many.

        >>> PositionWeights.of(torch.tensor([1.0, 0.0, 1.0])).index
        tensor([0, 2])
        """
        flat = m.reshape(-1)
        index = flat.nonzero().squeeze(1) if gather else None
        if index is not None and len(index) > (1 - _GATHER_FROM) * len(flat):
            index = None
        kept = flat if index is None else flat[index]
        return cls(m, index, None if bool((kept == 1).all()) else kept, _runs(flat) if gather else None)

    def to(self, device: torch.device) -> PositionWeights:
        """Return a copy on ``device``."""
        index, kept = (t if t is None else t.to(device, non_blocking=True) for t in (self.index, self.kept))
        return PositionWeights(self.m.to(device, non_blocking=True), index, kept, self.runs)


def _runs(flat: Tensor) -> Runs | None:
    values, counts = torch.unique_consecutive(flat, return_counts=True)
    if int(values.count_nonzero()) > _MOST_RUNS:
        return None
    stops = counts.cumsum(0)
    runs = zip((stops - counts).tolist(), stops.tolist(), values.tolist(), strict=True)
    return tuple(run for run in runs if run[2])


def _rows(x: Tensor, index: Tensor | None, lead: int) -> Tensor:
    """Take the kept positions of ``x`` ``(B, T, D)``, whose weights have ``lead`` axes, as rows: ``(N, ..., D)``."""
    rows = x.flatten(0, lead - 1)
    return rows if index is None else rows.index_select(0, index)


def _input_rows(x: Tensor, index: Tensor | None, kept: Tensor | None, lead: int, last: list[Taken] | None) -> Tensor:
    """Take the kept positions of a layer's input, weighed unless ``kept`` is None, once for all layers that read it.

    ``last`` keeps that input alive, so another one with its memory and version is the same.
    """
    for known, version, weighed, rows in last or ():
        same = known.dtype == x.dtype and known.is_set_to(x) and version == x._version
        if same and weighed == (kept is not None):
            return rows
    rows = _rows(x, index, lead)
    rows = rows if kept is None else rows * spread(kept, rows)
    if last is not None:
        last[:] = [(x, x._version, kept is not None, rows)]
    return rows


def _sum_over_runs(grad: Tensor, x: Tensor, runs: Runs) -> Tensor:
    """Return the sum over runs of ``weight * grad[run].T @ x[run]``, for rows ``(N, O)`` and ``(N, D)``."""
    total = grad.new_empty(grad.shape[1], x.shape[1]) if runs else grad.new_zeros(grad.shape[1], x.shape[1])
    for i, (start, stop, weight) in enumerate(runs):
        total.addmm_(grad[start:stop].t(), x[start:stop], beta=float(i > 0), alpha=weight)
    return total


def _parameter_gradients(
    grad: Tensor,
    x: Tensor | None,
    index: Tensor | None,
    kept: Tensor | None,
    runs: Runs | None,
    lead: int,
    bias: bool,
    last: list[Taken] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of weight and bias; ``x`` None leaves out the former, ``bias`` False the latter."""
    if (
        runs is not None and x is not None and not bias and grad.element_size() > 2
    ):  # bfloat16 would round every run's sum
        inner = grad.shape[lead:-1].numel()
        runs = tuple((start * inner, stop * inner, weight) for start, stop, weight in runs)
        return _sum_over_runs(grad.flatten(0, -2), x.flatten(0, -2), runs), None
    rows_grad = _rows(grad, index, lead)
    # one of the two factors is weighed, the narrower if it may be either
    weigh_grad = bias or x is None or x.shape[-1] > grad.shape[-1]
    rows_x = None if x is None else _input_rows(x, index, None if weigh_grad else kept, lead, last)
    if kept is not None and weigh_grad:
        rows_grad = rows_grad * spread(kept, rows_grad)
    rows_grad = rows_grad.reshape(-1, grad.shape[-1])  # (N, O)
    weight_grad = None if rows_x is None else rows_grad.t() @ rows_x.reshape(-1, rows_x.shape[-1])
    return weight_grad, rows_grad.sum(0) if bias else None


class _RoutedLinear(torch.autograd.Function):
    # Plain tensors as arguments rather than one PositionWeights: torch.compile can trace these.
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        kept: Tensor | None,
        runs: Runs | None,
        lead: int,
        last: list[Taken] | None,
    ) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, index, kept, ctx.runs, ctx.lead, ctx.last = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, index, kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ weight if needs_x else None
        grad_weight = grad_bias = None
        if needs_weight or needs_bias:
            grad_weight, grad_bias = _parameter_gradients(
                grad, x, index, kept, ctx.runs, ctx.lead, needs_bias, ctx.last
            )
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def routed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, m: Tensor | PositionWeights) -> Tensor:
    r"""Parameter-edge routing of a linear layer: ``F.linear`` whose parameter gradients weigh each position by ``m``.

    .. math::
        y = x W^\top + b, \quad
        \partial_x = \partial_y W, \quad
        \partial_W = (m \odot \partial_y)^\top x, \quad
        \partial_b = \textstyle\sum m \odot \partial_y

    The gradient to ``x`` is exact and unmasked, so other parameters learn as if nothing had been routed: SGTM's
    parameter masking (arXiv 2512.05648) at the granularity of one position, in one pass over a batch of mixed labels.

    Args:
        x: ``(B, D)`` or ``(B, T, D)``.
        weight: ``(O, D)``.
        bias: ``(O,)`` or None.
        m: ``(B,)`` or ``(B, T)``; prepare it once with `PositionWeights.of` where several layers share it.

    Returns:
        ``(B, O)`` or ``(B, T, O)``.

    Example:
        >>> x, w = torch.eye(2), torch.zeros(1, 2, requires_grad=True)
        >>> routed_linear(x, w, None, torch.tensor([1.0, 0.0])).sum().backward()
        >>> w.grad
        tensor([[1., 0.]])
    """
    if torch.is_autocast_enabled(x.device.type):  # inside the Function its backward would meet two dtypes
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    weights = m if isinstance(m, PositionWeights) else PositionWeights.of(m)
    last = None if torch.compiler.is_compiling() else weights.last  # addresses cannot be traced
    return _RoutedLinear.apply(x, weight, bias, weights.index, weights.kept, weights.runs, weights.m.dim(), last)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        return grad * spread(m, grad), None


def scale_gradient(x: Tensor, m: Tensor) -> Tensor:
    r"""Activation-edge routing: the value of ``x``, with its gradient multiplied by ``m``.

    .. math:: y = x, \qquad \partial_x = m \odot \partial_y

    The mask of gradient routing as first published (arXiv 2410.04332, section 3): it also weighs all that flows further
    upstream. On the output of an embedding it is parameter-edge routing, because the table is that edge's only leaf.
    The usual ``m * x + (1 - m) * x.detach()`` has the same gradient but moves the value in low precision.

    Args:
        x: ``(B, ...)`` or ``(B, T, ...)``.
        m: ``(B,)`` or ``(B, T)``.

    Example:
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> scale_gradient(x, torch.tensor([1.0, -0.5])).sum().backward()
        >>> x.grad
        tensor([[ 1.0000,  1.0000,  1.0000],
                [-0.5000, -0.5000, -0.5000]])
    """
    return _ScaleGradient.apply(x, m)


class _RoutedParameter(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, m: Tensor) -> Tensor:
        return weight.expand(*m.shape[:-1], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        m = m.expand(*grad.shape[:-1], 1).flatten().to(grad.dtype)
        return m @ grad.flatten(0, -2), None


def routed_parameter(weight: Tensor, m: Tensor) -> Tensor:
    """Parameter-edge routing of an elementwise parameter, the gain of a norm say: one view of it per position.

    Args:
        weight: ``(D,)``.
        m: ``(B, 1)``, ``(B, T, 1)`` or any such shape that broadcasts against the activations ``(B, T, D)``.

    Returns:
        ``weight`` expanded to ``(B, D)``, ``(B, T, D)``, … without a copy. Its gradient weighs each position by ``m``.

    Example:
        >>> gain = torch.ones(2, requires_grad=True)
        >>> (routed_parameter(gain, torch.tensor([[1.0], [0.0]])) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        >>> gain.grad
        tensor([1., 2.])
    """
    return _RoutedParameter.apply(weight, m)


def routed_module(g: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    r"""Parameter-edge routing of any small module, at the price of a second evaluation.

    .. math:: y = g_{\mathrm{sg}(\theta)}(x) + m \odot \bigl(g_\theta(\mathrm{sg}(x)) - \mathrm{sg}(g_\theta(x))\bigr)

    with ``sg`` the stop-gradient. The bracket is exactly zero, so the value is that of ``g(x)`` bit for bit; a weight of
    zero gives parameter gradients of exactly zero, and the gradient to ``x`` is unmasked.

    Args:
        g: a deterministic module that treats positions alone (for ``m`` ``(B, T)``) or examples alone (``(B,)``).
        x: ``(B, ...)`` or ``(B, T, ...)``; leading axes must survive in the output.
        m: ``(B,)`` or ``(B, T)``.

    Example:
        >>> norm, x = nn.LayerNorm(2), torch.tensor([[1.0, 3.0], [5.0, 1.0]])
        >>> routed_module(norm, x, torch.tensor([0.0, 1.0])).sum().backward()
        >>> norm.weight.grad
        tensor([ 1.0000, -1.0000])
    """
    detached = {name: p.detach() for name, p in g.named_parameters()}
    through_x = torch.func.functional_call(g, detached, (x,))
    through_parameters = g(x.detach())
    return through_x + spread(m, through_x) * (through_parameters - through_parameters.detach())
