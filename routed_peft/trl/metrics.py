"""Metrics of routed rollouts, added to TRL's, over all processes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor


def rollout_metrics(
    labels: Sequence[str],
    rewards: Tensor,
    *,
    anchor: Tensor,
    tokens: Mapping[str, int],
    flagged: Collection[str],
    environments: Sequence[str | None],
) -> dict[str, float]:
    """Return the metrics of one generation batch.

    ``labels`` are those of each rollout, or of its first token; ``rewards`` ``(N,)`` are NaN where there is none; ``anchor``
    is bool ``(N,)``; ``tokens`` counts the completion tokens of each label; ``environments`` are all None where the dataset
    has no such column. The metrics are ``routing/flag_rate``, ``routing/anchor_share``; by label ``routing/share/…``,
    ``routing/tokens/…`` and ``routing/reward/…``; by environment ``routing/environment/…/flag_rate`` and ``…/reward``.

    >>> found = rollout_metrics(["flagged", "unflagged"], torch.tensor([1.0, 0.5]), anchor=torch.tensor([False, True]),
    ...                         tokens={"flagged": 3, "unflagged": 4}, flagged=["flagged"], environments=["B", "A"])
    >>> found["routing/flag_rate"], found["routing/reward/flagged"], found["routing/environment/B/flag_rate"]
    (0.5, 1.0, 1.0)
    """
    flags = torch.tensor([label in flagged for label in labels])
    metrics = {"routing/flag_rate": _mean(flags), "routing/anchor_share": _mean(anchor)}
    for label in sorted(set(labels)):
        rows = torch.tensor([other == label for other in labels])
        metrics[f"routing/share/{label}"] = _mean(rows)
        metrics[f"routing/reward/{label}"] = rewards[rows].nanmean().item()
    for label, count in tokens.items():
        metrics[f"routing/tokens/{label}"] = float(count)
    for environment in sorted({str(e) for e in environments if e is not None}):
        rows = torch.tensor([str(other) == environment for other in environments])
        metrics[f"routing/environment/{environment}/flag_rate"] = _mean(flags[rows])
        metrics[f"routing/environment/{environment}/reward"] = rewards[rows].nanmean().item()
    return metrics


def _mean(values: Tensor) -> float:
    return values.float().mean().item()
