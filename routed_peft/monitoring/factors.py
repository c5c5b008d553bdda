r"""A region at one layer as a product of two matrices, :math:`D = s\,B A`, and the growth of its norm in one step.

A LoRA has this form by definition. Extra hidden units of an MLP are taken with every gate at one, so ``A`` is the projection
up and ``B`` the one down (gates and biases do not count). A subspace region is :math:`D = U M` with ``U`` fixed and
orthonormal, so :math:`\lVert D \rVert = \lVert M \rVert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from routed_peft.adapters import tuner_layers
from routed_peft.regions.projections import project_off


class Pair(NamedTuple):
    """Values of the two factors: ``a`` ``(r, D)``, and ``b`` ``(O, r)`` or None where it is fixed and orthonormal."""

    a: Tensor
    b: Tensor | None


@dataclass(frozen=True, eq=False)
class Factors:
    """A region at one layer."""

    name: str  # of the layer
    layer: nn.Module  # of PEFT
    a: nn.Linear  # holds A
    b: nn.Linear | None  # holds B; None where that is fixed and orthonormal
    scale: float = 1.0  # s
    off: Tensor | None = None  # a basis that B is projected off in the forward pass

    @property
    def modules(self) -> list[nn.Linear]:
        """The modules that hold the factors; the output of the last, times ``s``, is the region's, up to a rotation."""
        return [self.a] if self.b is None else [self.a, self.b]

    def read(self) -> Pair:
        """Return copies of the factors."""
        a = gather_full(self.a.weight).detach().clone()
        if self.b is None:
            return Pair(a, None)
        b = gather_full(self.b.weight).detach()
        return Pair(a, b.clone() if self.off is None else project_off(b.T, self.off).T)


def gather_full(tensor: Any) -> Tensor:
    """Return a full tensor, gathered over processes if it is sharded (FSDP2)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def find_factors(model: nn.Module, region: str) -> list[Factors]:
    """Return the layers of ``region``; raise ValueError without any, and on one that is no product of two linear modules.

    Rows of the token table, gains of norms and heads, the other parts of a whole region, are left out.
    """
    found: list[Factors] = []
    for name, module in tuner_layers(model):
        layer: Any = module
        for inner, outer in (("lora_A", "lora_B"), ("routed_M", None), ("routed_up", "routed_down")):
            if region not in getattr(layer, inner, ()):
                continue
            a, b = getattr(layer, inner)[region], getattr(layer, outer)[region] if outer else None
            if not isinstance(a, nn.Linear) or not isinstance(b, nn.Linear | None):
                raise ValueError(f"the region {region!r} has a {type(layer).__name__} at {name!r}, which the monitor "
                                 "cannot read: use `RoutedConfig` regions, or plain LoRA on linear layers")  # fmt: skip
            off = layer.basis(region) if outer == "lora_B" and region in getattr(layer, "routed_U", ()) else None
            scale = float(layer.scaling[region]) if outer == "lora_B" else 1.0
            found.append(Factors(name.removeprefix("base_model.model."), layer, a, b, scale, off))
    if not found:
        raise ValueError(f"the model has no region {region!r} with hidden units or low-rank layers, which the monitor reads: "
                         "name one of its adapters")  # fmt: skip
    return found


def squared_norm(pair: Pair, scale: float) -> Tensor:
    r"""Return :math:`\lVert D \rVert_F^2 = s^2 \operatorname{tr}(B^\top B \, A A^\top)`, from r × r Gram matrices.

    >>> import torch
    >>> a, b = torch.randn(2, 5), torch.randn(4, 2)
    >>> torch.allclose(squared_norm(Pair(a, b), 2.0), (2.0 * b @ a).square().sum())
    True
    """
    a, b = pair
    total = a.square().sum() if b is None else ((b.T @ b) * (a @ a.T)).sum()
    return scale**2 * total.clamp(min=0)


def sensitivities(before: Pair, after: Pair, scale: float) -> Sequence[Tensor]:
    r"""Return matrices ``V`` by which the growth of a squared norm is exactly linear in the steps of the factors.

    With :math:`D' = D + \Delta` after the step and midpoints :math:`\bar A, \bar B`,

    .. math::
        \lVert D' \rVert^2 - \lVert D \rVert^2 = 2 \langle D, \Delta \rangle + \lVert \Delta \rVert^2
        = \langle D + D', \Delta \rangle
        = \langle V_A, \delta A \rangle + \langle V_B, \delta B \rangle, \\
        V_A = s\,\bar B^\top (D + D'), \qquad V_B = s\,(D + D') \bar A^\top

    because :math:`\Delta = s (\delta B\,\bar A + \bar B\,\delta A)`. Parts of a step then have parts of the growth that add
    up, the quadratic term included. The shapes are ``(r, D)`` and, unless ``B`` is fixed, ``(O, r)``.

    >>> import torch
    >>> old, new = (Pair(torch.randn(2, 5), torch.randn(4, 2)) for _ in range(2))
    >>> v_a, v_b = sensitivities(old, new, 0.5)
    >>> growth = (v_a * (new.a - old.a)).sum() + (v_b * (new.b - old.b)).sum()
    >>> torch.allclose(growth, squared_norm(new, 0.5) - squared_norm(old, 0.5), rtol=1e-4, atol=1e-4)
    True
    """
    (a, b), (a_, b_) = before, after
    if b is None or b_ is None:
        return (scale**2 * (a + a_),)
    mid_a, mid_b = (a + a_) / 2, (b + b_) / 2
    v_a = (mid_b.T @ b) @ a + (mid_b.T @ b_) @ a_
    v_b = b @ (a @ mid_a.T) + b_ @ (a_ @ mid_a.T)
    return scale**2 * v_a, scale**2 * v_b
