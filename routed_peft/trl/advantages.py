"""What is decided per group, that is for all rollouts of one prompt: their baseline, and whether they are anchors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from trl.trainer.utils import nanstd


def unflagged_advantages(rewards: Tensor, flagged: Tensor, num_generations: int, scale_rewards: str) -> Tensor:
    r"""Return advantages over the mean reward of the *unflagged* rollouts of each group.

    .. math::
        a_i = \frac{r_i - \operatorname{mean}_{j \in G,\, j \text{ unflagged}} r_j}{\operatorname{std}_{j \in G} r_j + 10^{-4}}

    Otherwise rewarded hacks would raise the baseline and make honest rollouts look bad. Where all of a group are flagged
    the mean is over the whole group; the spread always is.

    Args:
        rewards: ``(N,)`` in TRL's global order, groups together; NaN where a rollout could not be scored.
        flagged: bool ``(N,)``.
        num_generations: G.
        scale_rewards: TRL's ``"group"``, ``"batch"`` or ``"none"``.

    Returns:
        ``(N,)``; 0 for rollouts without a score. Equal to TRL's where nothing is flagged.

    Example:
        >>> unflagged_advantages(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([False, False, True]), 3, "none")
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


def anchor_groups(
    environments: Sequence[str | None], share: float, trusted: Collection[str] | None, seed: Sequence[int]
) -> np.ndarray:
    """Draw the groups whose rollouts are sampled with the regions ablated.

    Args:
        environments: of each group of a generation batch, over all processes.
        share: of all groups. What is left of a group is drawn by lot; fewer are taken where fewer are trusted.
        trusted: environments that may be drawn, or None for all.
        seed: same seed, same groups.

    Returns:
        bool, one per group.

    Example:
        >>> anchor_groups(["A", "B", "A", "B"], 0.5, ["A"], seed=[0]).tolist()
        [True, False, True, False]
    """
    rng = np.random.default_rng(seed)
    wanted = int(len(environments) * share + rng.random())
    eligible = np.array([trusted is None or environment in trusted for environment in environments], dtype=bool)
    chosen = rng.permutation(np.flatnonzero(eligible))[:wanted]
    return np.isin(np.arange(len(environments)), chosen)
