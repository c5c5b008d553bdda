r"""Projections onto a subspace and off it: of a gradient, of an output, and of a weight after an optimizer step.

With an orthonormal basis ``U`` ``(d, k)``, :math:`P = U U^\top` projects onto its span, and :math:`P_\perp = I - U U^\top` onto
the orthogonal complement ("off the subspace").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def project_off(x: Tensor, u: Tensor) -> Tensor:
    r"""Return :math:`P_\perp x` for every row of ``x`` ``(..., d)``, computed in ``u``'s precision or better.

    >>> project_off(torch.tensor([3.0, 4.0]), torch.tensor([[1.0], [0.0]]))
    tensor([0., 4.])
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, u.dtype)
        rows, basis = x.to(dtype).reshape(-1, len(u)), u.to(dtype)
        return torch.addmm(rows, rows @ basis, basis.T, alpha=-1).reshape(x.shape).to(x.dtype)


class _CutGradient(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, u: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return project_off(grad, ctx.saved_tensors[0]), None


def cut_gradient(y: Tensor, u: Tensor) -> Tensor:
    r"""Return ``y`` unchanged; its gradient loses its component in the subspace.

    .. math:: y \mapsto y, \qquad \partial_y \mapsto P_\perp \partial_y

    At the output of every residual writer, this gives the modules that computed ``y`` no gradient for moving it within the
    subspace.

    Args:
        y: ``(..., d)``.
        u: ``(d, k)``, orthonormal.

    Example:
        >>> y = torch.zeros(2, requires_grad=True)
        >>> cut_gradient(y, torch.tensor([[1.0], [0.0]])).sum().backward()
        >>> y.grad
        tensor([0., 1.])
    """
    return _CutGradient.apply(y, u)


def joint_basis(bases: Sequence[Tensor]) -> Tensor | None:
    """Return an orthonormal basis of the sum of subspaces, or None where there are none.

    >>> joint_basis([torch.eye(3)[:, :1], torch.eye(3)[:, :2]]).shape
    torch.Size([3, 2])
    """
    if len(bases) < 2:
        return bases[0] if bases else None
    vectors, values, _ = torch.linalg.svd(torch.cat(list(bases), 1), full_matrices=False)
    return vectors[:, values > 1e-4]


def restore_component(matrix: Tensor, u: Tensor, part: Tensor) -> None:
    r"""Set the component of ``matrix`` along the subspace back to ``part``, in place.

    .. math:: W \leftarrow W - U (U^\top U)^{+} (U^\top W - C_0)

    The middle factor is the identity for an orthonormal ``u``, but not for the columns of several bases side by side.

    Args:
        matrix: W, ``(d, n)``.
        u: U, ``(d, k)``.
        part: :math:`C_0`, the coordinates to restore, ``(k, n)``.

    >>> w = torch.tensor([[1.0], [2.0]])
    >>> restore_component(w, torch.tensor([[1.0], [0.0]]), torch.tensor([[5.0]])); w
    tensor([[5.],
            [2.]])
    """
    dtype = torch.promote_types(matrix.dtype, u.dtype)
    u, wide = u.to(dtype), matrix.to(dtype)
    excess = u.T @ wide - part.to(dtype)
    gram = u.T @ u
    if not torch.allclose(gram, torch.eye(len(gram), dtype=dtype, device=u.device), rtol=0, atol=1e-4):
        excess = torch.linalg.pinv(gram, rtol=1e-6) @ excess
    if matrix.dtype == dtype:
        matrix.addmm_(u, excess, alpha=-1)
    else:
        matrix.sub_(u @ excess)
