"""The operators of gradient routing: unchanged forward passes, and backward passes with one weight per position.

Gradient routing (Cloud et al., arXiv 2410.04332) multiplies the gradient along chosen edges of the graph by a
data-dependent weight ``m``: 1 passes it, 0 blocks it, a negative weight reverses it.

Shapes: ``B`` examples, ``T`` positions, ``D`` features in, ``O`` features out. ``m`` is ``(B,)``, one weight per
example, or ``(B, T)``, one per position, and lines up with the leading axes of the tensor that it weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def spread(m: Tensor, like: Tensor) -> Tensor:
    """Return ``m`` in the dtype of ``like`` and with trailing axes of size one, so that it broadcasts from the left.

    >>> spread(torch.ones(2, 3), torch.ones(2, 3, 4, 5)).shape
    torch.Size([2, 3, 1, 1])
    """
    return m.reshape(m.shape + (1,) * (like.dim() - m.dim())).to(like.dtype)


_MOST_KEPT = 0.75  # share of positions up to which copying those of nonzero weight costs less than multiplying all
_MOST_RUNS = 8  # number of runs up to which adding up their products costs less than copying

Runs = tuple[tuple[int, int, float], ...]
"""Stretches of neighboring positions that share one nonzero weight: (start, stop, weight), in flat positions."""


@dataclass(frozen=True, slots=True)
class PositionWeights:
    """Weights ``m`` prepared once for many layers: the positions that enter weight gradients, and their weights.

    A flat position counts through ``(B,)`` or ``(B, T)`` row by row.

    Attributes:
        m: ``(B,)`` or ``(B, T)``.
        index: flat positions of nonzero weight, ``(N,)``; None where all positions enter.
        kept: weights of these positions, ``(N,)``; None where all are one.
        runs: the same by stretches, which need no copy of the positions; None where there are too many.
    """

    m: Tensor
    index: Tensor | None
    kept: Tensor | None
    runs: Runs | None = None

    @classmethod
    def from_weights(cls, m: Tensor, gather: bool = True) -> PositionWeights:
        """Prepare ``m``; with ``gather``, many positions of weight zero are left out of weight-gradient matmuls."""
        flat = m.reshape(-1)
        index = flat.nonzero().squeeze(1) if gather else None
        if index is not None and len(index) > _MOST_KEPT * len(flat):
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
    """Return the positions ``index`` of ``x`` as rows ``(N, ..., D)``; ``lead`` is the weights' number of axes, 1 or 2."""
    rows = x.flatten(0, lead - 1)
    return rows if index is None else rows.index_select(0, index)


@dataclass(slots=True, eq=False)
class RowCache:
    """The rows last taken of a layer's input, for neighboring layers that read the same input (query, key and value).

    One cache serves one `PositionWeights` during one step. It keeps the input alive, so that no other tensor gets its memory.
    """

    source: Tensor | None = None
    state: tuple[int, bool] | None = None  # version of the source, and whether its rows were weighed
    rows: Tensor | None = None


def _input_rows(x: Tensor, index: Tensor | None, *, kept: Tensor | None, lead: int, cache: RowCache | None) -> Tensor:
    """Return `_rows` of a layer's input, times the weights ``kept`` unless that is None; neighbors share them by ``cache``."""
    if cache is not None and cache.rows is not None and cache.source is not None:
        same = cache.source.dtype == x.dtype and cache.source.is_set_to(x)
        if same and cache.state == (x._version, kept is not None):
            return cache.rows
    rows = _rows(x, index, lead)
    rows = rows if kept is None else rows * spread(kept, rows)
    if cache is not None:
        cache.source, cache.state, cache.rows = x, (x._version, kept is not None), rows
    return rows


def _sum_over_runs(grad: Tensor, x: Tensor, *, runs: Runs, lead: int) -> Tensor:
    """Return the sum over runs of ``weight * grad[run].T @ x[run]``, ``(O, D)``."""
    inner = grad.shape[lead:-1].numel()  # rows per weight: T where a weight belongs to a whole example
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    total = grad.new_empty(grad.shape[1], x.shape[1]) if runs else grad.new_zeros(grad.shape[1], x.shape[1])
    for i, (start, stop, weight) in enumerate(runs):
        run = slice(start * inner, stop * inner)
        total.addmm_(grad[run].t(), x[run], beta=float(i > 0), alpha=weight)
    return total


class _RoutedLinear(torch.autograd.Function):
    # the arguments for the backward pass are plain tensors, not one PositionWeights, because torch.compile can trace those
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, index, kept, ctx.runs, ctx.lead, ctx.cache = inputs
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, index, kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, kept = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ weight if needs_x else None
        grad_weight = grad_bias = None
        rounds_each_sum = grad.element_size() <= 2  # bfloat16 would be rounded once per run
        if needs_weight and not needs_bias and ctx.runs is not None and not rounds_each_sum:
            grad_weight = _sum_over_runs(grad, x, runs=ctx.runs, lead=ctx.lead)
        elif needs_weight or needs_bias:
            rows_grad = _rows(grad, index, ctx.lead)
            # only one of the two factors is weighed: the narrower one, where there is a choice
            weigh_grad = needs_bias or x.shape[-1] > grad.shape[-1]
            if weigh_grad and kept is not None:
                rows_grad = rows_grad * spread(kept, rows_grad)
            rows_grad = rows_grad.reshape(-1, grad.shape[-1])
            if needs_weight:
                rows_x = _input_rows(x, index, kept=None if weigh_grad else kept, lead=ctx.lead, cache=ctx.cache)
                grad_weight = rows_grad.t() @ rows_x.reshape(-1, x.shape[-1])
            grad_bias = rows_grad.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def routed_linear(
    x: Tensor, weight: Tensor, *, m: Tensor | PositionWeights, bias: Tensor | None = None, cache: RowCache | None = None
) -> Tensor:
    r"""Parameter-edge routing of a linear layer: ``F.linear`` whose parameter gradients weigh each position by ``m``.

    .. math::
        y = x W^\top + b, \quad
        \partial_x = \partial_y W, \quad
        \partial_W = (m \odot \partial_y)^\top x, \quad
        \partial_b = \textstyle\sum m \odot \partial_y

    The gradient to ``x`` is exact and unmasked, so other parameters learn as without routing. This is SGTM's parameter
    masking (arXiv 2512.05648) for single positions, in one pass over a batch of mixed labels.

    Args:
        x: ``(B, D)`` or ``(B, T, D)``.
        weight: ``(O, D)``.
        m: ``(B,)`` or ``(B, T)``; where several layers share it, prepare it once by `PositionWeights.from_weights`.
        bias: ``(O,)`` or None.
        cache: shared by the layers that share ``m`` within one step; it saves copies where they read the same input.

    Returns:
        ``(B, O)`` or ``(B, T, O)``.

    >>> x, w = torch.eye(2), torch.zeros(1, 2, requires_grad=True)
    >>> routed_linear(x, w, m=torch.tensor([1.0, 0.0])).sum().backward()
    >>> w.grad
    tensor([[1., 0.]])
    """
    if torch.is_autocast_enabled(x.device.type):  # cast here: inside the Function, backward would see two dtypes
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    weights = m if isinstance(m, PositionWeights) else PositionWeights.from_weights(m)
    cache = None if torch.compiler.is_compiling() else cache  # it compares memory addresses, which are not traced
    return _RoutedLinear.apply(x, weight, bias, weights.index, weights.kept, weights.runs, weights.m.dim(), cache)


class _SavesWeights(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])


class _ScaleGradient(_SavesWeights):
    @staticmethod
    def forward(x: Tensor, m: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        return grad * spread(m, grad), None


def scale_gradient(x: Tensor, m: Tensor) -> Tensor:
    r"""Activation-edge routing: the value of ``x``, with its gradient multiplied by ``m``.

    .. math:: y = x, \qquad \partial_x = m \odot \partial_y

    The mask of gradient routing as first published (arXiv 2410.04332, section 3): it weighs the gradient of everything
    upstream, too. On the output of an embedding it equals parameter-edge routing, because only the table is upstream.
    The usual ``m * x + (1 - m) * x.detach()`` has the same gradient, but rounds the value in low precision.

    Args:
        x: ``(B, ...)`` or ``(B, T, ...)``.
        m: ``(B,)`` or ``(B, T)``.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> scale_gradient(x, torch.tensor([1.0, -0.5])).sum().backward()
    >>> x.grad
    tensor([[ 1.0000,  1.0000,  1.0000],
            [-0.5000, -0.5000, -0.5000]])
    """
    return _ScaleGradient.apply(x, m)


class _RoutedParameter(_SavesWeights):
    @staticmethod
    def forward(weight: Tensor, m: Tensor) -> Tensor:
        return weight.expand(*m.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (m,) = ctx.saved_tensors
        return m.flatten().to(grad.dtype) @ grad.flatten(0, -2), None


def routed_parameter(weight: Tensor, m: Tensor) -> Tensor:
    """Parameter-edge routing of an elementwise parameter, such as the gain of a norm: one view of it per position.

    Args:
        weight: ``(D,)``.
        m: ``(B, 1)``, ``(B, T, 1)`` or any such shape that broadcasts against the activations ``(B, T, D)``; unlike elsewhere
            in this module it has trailing axes, because heads may come before positions.

    Returns:
        ``weight`` expanded to ``(B, D)``, ``(B, T, D)``, … without a copy. Its gradient weighs each position by ``m``.

    >>> gain = torch.ones(2, requires_grad=True)
    >>> (routed_parameter(gain, torch.tensor([[1.0], [0.0]])) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    >>> gain.grad
    tensor([1., 2.])
    """
    return _RoutedParameter.apply(weight, m)


def routed_module(g: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    r"""Parameter-edge routing of any small module, at the price of a second evaluation.

    .. math:: y = g_{\mathrm{sg}(\theta)}(x) + m \odot \bigl(g_\theta(\mathrm{sg}(x)) - \mathrm{sg}(g_\theta(x))\bigr)

    with ``sg`` the stop-gradient. The bracket is exactly zero, so the value equals ``g(x)`` bit for bit. A weight of zero
    gives parameter gradients of exactly zero, and the gradient to ``x`` is unmasked.

    Args:
        g: a deterministic module that maps each position (for ``m`` ``(B, T)``) or example (``(B,)``) by itself.
        x: ``(B, ...)`` or ``(B, T, ...)``; the output must keep the leading axes.
        m: ``(B,)`` or ``(B, T)``.

    >>> norm, x = nn.LayerNorm(2), torch.tensor([[1.0, 3.0], [5.0, 1.0]])
    >>> routed_module(norm, x, torch.tensor([0.0, 1.0])).sum().backward()
    >>> norm.weight.grad
    tensor([ 1.0000, -1.0000])
    """
    detached = {name: p.detach() for name, p in g.named_parameters()}
    through_x = torch.func.functional_call(g, detached, (x,))
    through_parameters = g(x.detach())
    return through_x + spread(m, through_x) * (through_parameters - through_parameters.detach())
