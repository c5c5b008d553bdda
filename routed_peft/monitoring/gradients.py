r"""Parameter gradients by environment, collected in the ordinary backward pass.

A linear layer's weight gradient is a sum over positions, :math:`\partial_W = \sum_i m_i\, g_i x_i^\top`, with the gradient
``g`` of its output, its input ``x`` and the routing weights ``m``. Summed over the rows of each environment separately, it
costs as much again as the weight gradient itself, for the few and small layers of a region.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from routed_peft.functional import spread
from routed_peft.routing.layers import parameter_weights


class EnvironmentGradients:
    """A recorder of linear modules' gradients: `start`, then `expect_batch` before every forward pass, then `stop`.

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

    def __init__(self, modules: Iterable[nn.Linear]) -> None:
        self.modules = list(modules)
        self.sums: dict[nn.Linear, dict[str, Tensor]] = {}
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
        """Stop recording; `sums` stay."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._rows = [], {}

    def clear(self) -> None:
        """Empty `sums`."""
        self.sums = {module: {} for module in self.modules}

    def _forward(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if not self._rows or not output.requires_grad:
            return
        x, rows, weights = args[0].detach(), self._rows, parameter_weights(module)
        if len(x) != self._size:
            raise ValueError(
                f"a region's {type(module).__name__} sees {len(x)} rows where the batch has {self._size}: layers that mix or "
                "flatten rows, such as experts, cannot be monitored by environment; put the region elsewhere"
            )
        output.register_hook(lambda grad: self._add(module, x, grad=grad, rows=rows, weights=weights))

    @torch.no_grad()
    def _add(
        self, module: nn.Linear, x: Tensor, *, grad: Tensor, rows: Mapping[str, Tensor], weights: list[Tensor]
    ) -> None:
        sums, dtype = self.sums[module], module.weight.dtype
        for m in weights:
            grad = grad * spread(m, grad)
        for name, index in rows.items():
            index = index.to(grad.device)
            g, values = (t.index_select(0, index).flatten(0, -2).to(dtype) for t in (grad, x))
            sums[name] = g.T @ values if name not in sums else sums[name].addmm_(g.T, values)
