r"""Per-environment attribution of a region's growth in one optimizer step, in signed parts that add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from routed_peft.monitoring.factors import Factors, Pair, gather_full, sensitivities, squared_norm
from routed_peft.monitoring.gradients import EnvironmentGradients


@dataclass
class Growth:
    r"""Growth of a region of L layers in one step, by environment (E of them).

    With :math:`D` its layers' products side by side and :math:`D'` those after the step,

    .. math:: \lVert D' \rVert - \lVert D \rVert = \sum_e c_e + \text{rest}, \qquad
        c_e = -\frac{\langle V,\; \eta\,p \odot g_e \rangle}{\lVert D \rVert + \lVert D' \rVert}

    with :math:`g_e` the environment's part of the (clipped) gradient, :math:`\eta` the learning rate,
    :math:`p = 1/(\sqrt{\hat v} + \epsilon)` Adam's diagonal after the step (1 for an optimizer that has none), and ``V`` of
    `sensitivities`. The rest is momentum (the effect of earlier gradients, less the later effect of these) and weight decay.
    A positive part means that the environment made the region grow.

    Attributes:
        size: Frobenius norm :math:`\lVert D' \rVert` after the step.
        growth: :math:`\lVert D' \rVert - \lVert D \rVert`.
        layer_sizes: norm after the step by layer, ``(L,)``.
        contributions: :math:`c_e` by layer, ``(L, E)``.
        raw: :math:`-\langle V, g_e \rangle / \lVert V \rVert` by layer, ``(L, E)``: the same direction without the
            optimizer's diagonal, to check against.
        captured: cosine between the recorded gradients and those of the optimizer; 1 if nothing was missed. NaN if it is not
            known (several processes, or no gradient).
    """

    size: float
    growth: float
    layer_sizes: Tensor
    contributions: Tensor
    raw: Tensor
    captured: float

    @property
    def rest(self) -> float:
        """The part without a cause in this step's gradients."""
        return self.growth - float(self.contributions.sum())


@dataclass
class GrowthMeter:
    """A meter of `Growth` over one optimizer step: call `before` it (after clipping), and `after` it."""

    factors: Mapping[str, Sequence[Factors]]  # region -> its layers
    gradients: EnvironmentGradients  # recorded in the step's backward passes
    environments: Sequence[str]  # in the order of the columns
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor  # sums over processes
    processes: int = 1
    _old: dict[str, tuple[list[Pair], Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def before(self) -> None:
        """Copy the factors, and compare the optimizer's gradients with the recorded ones."""
        for region, layers in self.factors.items():
            self._old[region] = [f.read() for f in layers], self._match(layers)

    def _match(self, layers: Sequence[Factors]) -> Tensor:
        """Return <used, used>, <used, seen> and <seen, seen>; used gradients are the seen ones times a clipping factor."""
        total = torch.zeros(3, device=layers[0].a.weight.device, dtype=layers[0].a.weight.dtype)
        for module in (module for f in layers for module in f.modules):
            if module.weight.grad is None:
                continue
            used, parts = gather_full(module.weight.grad), list(self.gradients.sums[module].values())
            seen = torch.stack(parts).sum(0) if parts else torch.zeros_like(used)
            total += torch.stack([(x * y).sum() for x, y in ((used, used), (used, seen), (seen, seen))])
        return total

    @torch.no_grad()
    def after(self, optimizer: Any) -> dict[str, Growth]:
        """Return the growth of every region; ``optimizer`` has made its step."""
        return {region: self._growth(region, optimizer) for region in self.factors}

    def _growth(self, region: str, optimizer: Any) -> Growth:
        layers, (old, match) = self.factors[region], self._old[region]
        across = self.reduce(match)[1] / self.processes
        clipped = match[0] / across if match[0] > 0 and across > 0 else torch.zeros_like(across)
        rates = step_sizes(optimizer, {module.weight for f in layers for module in f.modules})
        new = [f.read() for f in layers]
        zeros = match.new_zeros(len(layers), len(self.environments))
        contributions, raw, moved, steepness = zeros, zeros.clone(), match.new_zeros(()), match.new_zeros(())
        for i, (f, before, after) in enumerate(zip(layers, old, new, strict=True)):
            steps = zip(f.modules, sensitivities(before, after, f.scale), before, after, strict=False)
            for module, v, then, now in steps:
                moved += (v * (cast(Tensor, now) - cast(Tensor, then))).sum()
                steepness += v.square().sum()
                for name, g in self.gradients.sums[module].items() if module.weight in rates else ():
                    column = self.environments.index(name)
                    contributions[i, column] -= (v * rates[module.weight] * g).sum() * clipped
                    raw[i, column] -= (v * g).sum() * clipped
        contributions, raw = self.reduce(torch.stack([contributions, raw])) / self.processes
        squared = lambda pairs: torch.stack([squared_norm(p, f.scale) for f, p in zip(layers, pairs, strict=True)])
        squares = squared(new)
        norms = squares.sum().sqrt() + squared(old).sum().sqrt()
        used, both_ways, seen = match.tolist()
        return Growth(
            size=float(squares.sum().sqrt()),
            growth=float(_ratio(moved, norms)),
            layer_sizes=squares.sqrt().cpu(),
            contributions=_ratio(contributions, norms).cpu(),
            raw=_ratio(raw, steepness.sqrt()).cpu(),
            captured=both_ways / (used * seen) ** 0.5 if self.processes == 1 and used * seen > 0 else float("nan"),
        )


def _ratio(parts: Tensor, total: Tensor) -> Tensor:
    return parts / total if total > 0 else torch.zeros_like(parts)


def step_sizes(optimizer: Any, parameters: set[Tensor]) -> dict[Tensor, Tensor | float]:
    r"""Return the factor of every gradient in the step just made, without momentum, for parameters with a gradient.

    :math:`\eta / (\sqrt{\hat v} + \epsilon)` for Adam and its kin (whose state has ``exp_avg_sq``), the learning rate
    :math:`\eta` for all others.

    >>> p = torch.nn.Parameter(torch.tensor([1.0])); p.grad = torch.tensor([4.0])
    >>> adam = torch.optim.Adam([p], lr=0.1); adam.step()
    >>> step_sizes(adam, {p})[p]
    tensor([0.0250])
    """
    rates: dict[Tensor, Tensor | float] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in parameters and p.grad is not None:
                rates[p], state = float(group["lr"]), optimizer.state.get(p, {})
                squares = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
                if squares is not None and "betas" in group:
                    correction = 1 - group["betas"][1] ** float(state["step"])
                    rates[p] /= (gather_full(squares) / correction).sqrt() + group["eps"]
    return rates
