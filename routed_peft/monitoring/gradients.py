r"""Gradients by environment, collected in the ordinary backward pass: of parameters, and their energy in a subspace.

A linear layer's weight gradient is a sum over positions, :math:`\partial_W = \sum_i m_i\, g_i x_i^\top`, with the gradient
``g`` of its output, its input ``x`` and the routing weights ``m``. Summed over the rows of each environment separately, it
costs as much again as the weight gradient itself, for the few and small layers of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from routed_peft.adapters import tuner_layers
from routed_peft.functional import spread
from routed_peft.monitoring.environments import by_name
from routed_peft.monitoring.factors import Factors, gather_full
from routed_peft.routing.layers import parameter_weights
from routed_peft.subspaces import Subspace, haar


class Recorder:
    """A recorder of gradients at modules' outputs: `start`, then `expect_batch` before every forward pass, then `stop`.

    A subclass has `clear`, and `_adder`, which returns what takes the gradient of one forward pass.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        self.modules = list(modules)
        self._rows: Mapping[str, Tensor] = {}
        self._size = 0
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Start recording, with empty sums."""
        self.stop()
        self.clear()
        self._handles = [module.register_forward_hook(self._forward) for module in self.modules]

    def expect_batch(self, rows: Mapping[str, Tensor], size: int) -> None:
        """Announce the next forward pass: rows by environment, and their number ``size``."""
        self._rows, self._size = rows, size

    def stop(self) -> None:
        """Stop recording; sums stay."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._rows = [], {}

    def clear(self) -> None:
        """Empty the sums."""
        raise NotImplementedError

    def _forward(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if self._rows and output.requires_grad:
            output.register_hook(self._adder(module, args, self._rows))

    def _adder(self, module: Any, args: tuple[Any, ...], rows: Mapping[str, Tensor]) -> Callable[[Tensor], None]:
        raise NotImplementedError


class EnvironmentGradients(Recorder):
    """A recorder of linear modules' weight gradients.

    Attributes:
        sums: module -> environment -> gradient of its weight, ``(O, D)``, summed since `start`; in the units of ``.grad``
            before clipping and before any reduction over processes.

    >>> linear, x = nn.Linear(1, 1), torch.tensor([[1.0], [2.0], [3.0]])
    >>> gradients = EnvironmentGradients([linear])
    >>> gradients.start()
    >>> gradients.expect_batch({"a": torch.tensor([0, 2]), "b": torch.tensor([1])}, 3)
    >>> linear(x).sum().backward()
    >>> gradients.stop()
    >>> {name: g.item() for name, g in gradients.sums[linear].items()}, linear.weight.grad.item()
    ({'a': 4.0, 'b': 2.0}, 6.0)
    """

    def clear(self) -> None:
        """Empty `sums`."""
        self.sums: dict[nn.Linear, dict[str, Tensor]] = {module: {} for module in self.modules}

    def _adder(self, module: Any, args: tuple[Any, ...], rows: Mapping[str, Tensor]) -> Callable[[Tensor], None]:
        x, weights = args[0].detach(), parameter_weights(module)
        if len(x) != self._size:
            raise ValueError(f"a region's {type(module).__name__} sees {len(x)} rows where the batch has {self._size}: "
                             "layers that mix or flatten rows, such as experts, cannot be monitored by environment; put "
                             "the region elsewhere")  # fmt: skip

        @torch.no_grad()
        def add(grad: Tensor) -> None:
            sums, dtype = self.sums[module], module.weight.dtype
            for m in weights:
                grad = grad * spread(m, grad)
            for name, index in rows.items():
                index = index.to(grad.device)
                g, values = (t.index_select(0, index).flatten(0, -2).to(dtype) for t in (grad, x))
                sums[name] = g.T @ values if name not in sums else sums[name].addmm_(g.T, values)

        return add


class EnergyShare(Recorder):
    r"""The share of the gradient's energy that lies in a region's subspace, by environment.

    .. math:: \rho_e = \frac{\sum_i \lVert U^\top g_i \rVert^2}{\sum_i \lVert g_i \rVert^2}

    over the positions of the environment's rows and the region's writers, with the gradient ``g`` of a writer's output. A
    random subspace captures :math:`k/d` of isotropic gradients. Real gradients are far from isotropic, so a few fixed
    random subspaces are measured too.
    """

    def __init__(self, factors: Sequence[Factors], region: str, *, environments: Sequence[str], draws: int) -> None:
        super().__init__(f.layer for f in factors if f.b is None)
        self.region, self.environments, self.draws = region, list(environments), draws
        self._bases: dict[Any, list[Tensor]] = {}

    def clear(self) -> None:
        """Empty the sums."""
        self._sums: Tensor = torch.zeros(2 + self.draws, len(self.environments))  # all, along U, along random ones

    def _adder(self, module: Any, args: tuple[Any, ...], rows: Mapping[str, Tensor]) -> Callable[[Tensor], None]:
        if module not in self._bases:
            u: Tensor = module.basis(self.region)
            self._bases[module] = [u, *(haar(Subspace(u), seed).at(0).to(u) for seed in range(self.draws))]
        bases = self._bases[module]

        @torch.no_grad()
        def add(grad: Tensor) -> None:
            g = grad.to(bases[0].dtype)
            squares = torch.stack([t.square().flatten(1).sum(1) for t in (g, *(g @ basis for basis in bases))]).cpu()
            for name, index in rows.items():
                self._sums[:, self.environments.index(name)] += squares[:, index].sum(1)

        return add

    def shares(self, reduce: Any, device: torch.device) -> dict[str, dict[str, float]]:
        """Return ``{"energy": {environment: share}, "energy_random": ...}``; empty if the region has no subspace."""
        if not self.modules:
            return {}
        total, own, *random = reduce(self._sums.to(device)).cpu()
        shares = {"energy": own / total} | ({"energy_random": sum(random) / self.draws / total} if random else {})
        return {name: by_name(self.environments, values) for name, values in shares.items()}


@torch.no_grad()
def weight_drift(model: nn.Module, region: str) -> float | None:
    r"""Return the movement of the base's weights along a region's subspace since the region was made.

    .. math:: \lVert U^\top W - C_0 \rVert_F \, / \, \lVert C_0 \rVert_F, \qquad C_0 = U^\top W_0

    over all writers. It needs no copy of :math:`W_0`, unlike `routed_peft.subspaces.leak`. After `project_base` only rounding
    is left, about 1e-7 in float32. None if the region has no subspace, or keeps no :math:`C_0`.
    """
    moved = kept = 0.0
    for _, module in tuner_layers(model):
        layer: Any = module
        if region not in getattr(layer, "routed_C0", ()):
            continue
        full = gather_full(layer.base_layer.weight)
        weight = full.T if isinstance(layer.base_layer, Conv1D | nn.Embedding) else full
        part = layer.routed_C0[region][:, : weight.shape[1]]  # a last column more would be of the bias
        moved += float((layer.basis(region).T @ weight.to(part.dtype) - part).square().sum())
        kept += float(part.square().sum())
    return (moved / kept) ** 0.5 if kept else None
