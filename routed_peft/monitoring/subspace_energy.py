r"""Energy of the learning signal in a region's subspace ``U``, and drift of the base along it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from routed_peft.adapters import tuner_layers
from routed_peft.monitoring.factors import Factors, gather_full
from routed_peft.subspaces import Subspace, haar


class EnergyShare:
    r"""The share of the gradient's energy that lies in a region's subspace, by environment.

    .. math:: \rho_e = \frac{\sum_i \lVert U^\top g_i \rVert^2}{\sum_i \lVert g_i \rVert^2}

    over the positions of the environment's rows and the region's writers, with the gradient ``g`` of a writer's output. A
    random subspace captures :math:`k/d` of isotropic gradients. Real gradients are far from isotropic, so a few fixed
    random subspaces are measured too.
    """

    def __init__(self, factors: Sequence[Factors], region: str, *, environments: Sequence[str], draws: int) -> None:
        self.layers: list[Any] = [f.layer for f in factors if f.b is None]
        self.region, self.environments, self.draws = region, list(environments), draws
        self._bases: dict[Any, list[Tensor]] = {}
        self._rows: Mapping[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Start recording with the next forward pass, from empty sums."""
        self.stop()
        self._sums: Tensor = torch.zeros(2 + self.draws, len(self.environments))  # all, along U, along random ones
        self._handles = [layer.register_forward_hook(self._forward) for layer in self.layers]

    def expect_batch(self, rows: Mapping[str, Tensor]) -> None:
        """Announce the rows of the next forward pass by environment."""
        self._rows = rows

    def stop(self) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._rows = [], {}

    def _forward(self, layer: Any, _: Any, output: Tensor) -> None:
        if self._rows and output.requires_grad:
            rows = self._rows
            output.register_hook(lambda grad: self._add(layer, grad, rows))

    @torch.no_grad()
    def _add(self, layer: Any, grad: Tensor, rows: Mapping[str, Tensor]) -> None:
        if layer not in self._bases:
            u: Tensor = layer.basis(self.region)
            random = (haar(Subspace(u), seed).at(0) for seed in range(self.draws))
            self._bases[layer] = [u, *(basis.to(u) for basis in random)]
        bases = self._bases[layer]
        g = grad.to(bases[0].dtype)
        squares = torch.stack([t.square().flatten(1).sum(1) for t in (g, *(g @ basis for basis in bases))]).cpu()
        for name, index in rows.items():
            self._sums[:, self.environments.index(name)] += squares[:, index].sum(1)

    def shares(self, reduce: Any, device: torch.device) -> dict[str, dict[str, float]]:
        """Return ``{"energy": {environment: share}, "energy_random": ...}``; empty if the region has no subspace."""
        if not self.layers:
            return {}
        total, *captured = reduce(self._sums.to(device)).cpu()
        shares = [part / total for part in captured]
        means = {"energy": shares[0], "energy_random": torch.stack(shares[1:]).mean(0) if self.draws else None}
        return {
            name: {e: v for e, v in zip(self.environments, mean.tolist(), strict=True) if v == v}
            for name, mean in means.items()
            if mean is not None
        }


@torch.no_grad()
def weight_drift(model: nn.Module, region: str) -> float | None:
    r"""Return the movement of the base's weights along a region's subspace since the region was made.

    .. math:: \lVert U^\top W - C_0 \rVert_F \, / \, \lVert C_0 \rVert_F, \qquad C_0 = U^\top W_0

    over all writers. It needs no copy of :math:`W_0`, unlike `routed_peft.subspaces.leak`. After `project_base` only rounding
    is left, about 1e-7 in float32. None if the region has no subspace, or keeps no :math:`C_0`.
    """
    moved = kept = 0.0
    for _, layer in tuner_layers(model):
        layer_: Any = layer
        if region not in getattr(layer_, "routed_C0", ()):
            continue
        base = layer_.base_layer
        full = gather_full(base.weight)
        weight = full.T if isinstance(base, Conv1D | nn.Embedding) else full
        part = layer_.routed_C0[region][:, : weight.shape[1]]  # a last column more would be of the bias
        moved += float((layer_.basis(region).T @ weight.to(part.dtype) - part).square().sum())
        kept += float(part.square().sum())
    return (moved / kept) ** 0.5 if kept else None
