"""Measures of what the base learned along a subspace in spite of the protection: in weights and in activations."""

from __future__ import annotations

import torch
from torch import Tensor

from routed_peft.subspaces.basis import check_basis


@torch.no_grad()
def leak(weight: Tensor, initial: Tensor, u: Tensor) -> float:
    r"""Return the share of a writer's weight change that lies along the subspace.

    .. math:: \mathrm{leak}(W) = \frac{\lVert U^\top (W - W_0) \rVert^2}{\lVert W - W_0 \rVert^2}

    A change in random directions has k / d. After `routed_peft.regions.project_base` only rounding is left, about 1e-14 in
    float32. More than 1e-6 in float32, or 1e-3 in bfloat16, is an alarm. Weights are ``(d, n)``, so transpose those of a Conv1D
    or an embedding, and ``u`` is ``(d, k)``; 0 where nothing changed.

    >>> leak(torch.tensor([[3.0], [4.0]]), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]))
    0.36
    """
    check_basis(u)
    change = weight.cpu().double() - initial.cpu().double()  # on the CPU, because not every GPU has float64
    total = float(change.square().sum())
    return float((u.to(change).T @ change).square().sum()) / total if total else 0.0


@torch.no_grad()
def drift(hidden: Tensor, reference: Tensor, u: Tensor) -> float:
    r"""Return the relative change of hidden states along the subspace.

    .. math:: d_U = \frac{\lVert U^\top (h - h_0) \rVert}{\lVert U^\top h_0 \rVert}

    The cut removes the gradient along the subspace, which is a first-order protection. This measures the movement that
    remains, on fixed texts, with the region ablated. Hidden states are residual streams ``(..., d)``; the reference is that of
    the untrained model; ``u`` is ``(d, k)``.

    >>> drift(torch.tensor([3.0, 9.0]), torch.tensor([2.0, 0.0]), torch.tensor([[1.0], [0.0]]))
    0.5
    """
    check_basis(u)
    basis = u.cpu().double()
    before = reference.cpu().double() @ basis
    return float((hidden.cpu().double() @ basis - before).norm() / before.norm())
