"""Advantages over the unflagged rollouts of each group; a group is all rollouts of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer.utils import nanstd


def unflagged_advantages(rewards: Tensor, flagged: Tensor, *, num_generations: int, scale_rewards: str) -> Tensor:
    r"""Return advantages over the mean reward of the *unflagged* rollouts of each group.

    .. math::
        a_i = \frac{r_i - \operatorname{mean}_{j \in G,\, j \text{ unflagged}} r_j}{\operatorname{std}_{j \in G} r_j + 10^{-4}}

    Flagged rewards would otherwise raise the baseline and lower the advantages of honest rollouts. Where a whole group is
    flagged, the mean is over the whole group. The standard deviation always is.

    ``rewards`` ``(N,)`` are in TRL's global order, groups together, NaN where a rollout could not be scored; ``flagged`` is
    bool ``(N,)``; ``scale_rewards`` is TRL's ``"group"``, ``"batch"`` or ``"none"``. The result ``(N,)`` is 0 for rollouts
    without a score, and equal to TRL's where nothing is flagged.

    >>> unflagged_advantages(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([False, False, True]), num_generations=3,
    ...                      scale_rewards="none")
    tensor([-1.,  1.,  8.])
    """
    grouped, flags = rewards.view(-1, num_generations), flagged.view(-1, num_generations)
    honest = grouped.masked_fill(flags, torch.nan)
    none_left = honest.isnan().all(dim=1, keepdim=True)
    mean = torch.where(none_left, grouped, honest).nanmean(dim=1, keepdim=True)
    advantages = grouped - mean
    if scale_rewards == "group":
        advantages = advantages / (nanstd(grouped, dim=1).unsqueeze(1) + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return torch.nan_to_num(advantages.view(-1), nan=0.0)
