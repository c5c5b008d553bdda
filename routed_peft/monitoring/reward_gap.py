"""The reward gap: an environment's mean reward with a region minus that without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from routed_peft.ablation import ablated
from routed_peft.eval_mode import evaluating

Reward = Callable[[nn.Module, str], float]
"""``reward(model, environment)``: the mean reward of some rollouts."""


@torch.no_grad()
def reward_gaps(
    reward: Reward,
    model: nn.Module,
    *,
    regions: Iterable[str],
    environments: Sequence[str],
    mean: Callable[[Tensor], Tensor],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return region -> environment -> reward with the region on minus reward with it ablated.

    Both are measured in evaluation mode and under the same random numbers. The run's own generators are not changed.
    ``mean`` is that of a tensor over processes.
    """

    def rewards() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.tensor([float(reward(model, name)) for name in environments])

    gaps = {}
    with evaluating(model):
        full = rewards()
        for region in regions:
            with ablated(model, region):
                gaps[region] = mean(full - rewards())
    return {region: dict(zip(environments, gap.tolist(), strict=True)) for region, gap in gaps.items()}
