"""Benefit of a region to a row: by how much it lowers the row's loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from routed_peft.ablation import ablated
from routed_peft.data.labeled_batches import labeled_batches
from routed_peft.data.packing import document_means, document_of
from routed_peft.eval_mode import evaluating
from routed_peft.losses import token_losses
from routed_peft.routes import IGNORED

NO_DOCUMENT = torch.inf
"""Value at positions where no document begins, so that every row has equally many values."""


def benefit_threshold(forget: Tensor, retain: Tensor, kind: str = "balanced") -> float:
    r"""Return the benefit above which a row counts as forget.

    The "balanced" threshold is as many standard deviations below the mean of forget rows as above that of retain rows,

    .. math:: t = \frac{\mu_f \sigma_r + \mu_r \sigma_f}{\sigma_f + \sigma_r},

    at which normal distributions would have equal error rates on both sides. "median" takes medians and median absolute
    deviations instead, which a few wrong labels hardly move. "midpoint" is :math:`(\mu_f + \mu_r) / 2`.

    ``forget`` and ``retain`` are benefits of labeled rows of either side, ``(N,)`` and ``(M,)``, in nats per token.

    >>> forget, retain = torch.tensor([0.0, 2.0]), torch.tensor([-1.25, -0.75])
    >>> round(benefit_threshold(forget, retain), 2), benefit_threshold(forget, retain, "midpoint")
    (-0.6, 0.0)
    """
    (mu_f, above), (mu_r, below) = (middle_and_spread(side, kind) for side in (forget, retain))
    if kind == "midpoint" or 0 in (above, below):  # a spread of 0 says nothing about the width of a side
        above = below = 1.0
    return (mu_f * below + mu_r * above) / (above + below)


def middle_and_spread(values: Tensor, kind: str) -> tuple[float, float]:
    """Return mean and standard deviation; for "median" the lower median and the median absolute deviation."""
    values = values.double()
    if kind == "median":
        return float(values.median()), float((values - values.median()).abs().median())
    return float(values.mean()), float(values.std(correction=0))


@torch.no_grad()
def region_benefit(model: nn.Module, batch: dict[str, Tensor], regions: Sequence[str]) -> Tensor:
    """Return the loss without the regions minus the loss with them, at each token but the first: ``(B, T - 1)``, in nats.

    ``batch`` has ``input_ids``, ``labels`` and ``attention_mask``, ``(B, T)``; other keys are ignored.
    """
    return subset_benefits(model, batch, subsets=[regions], regions=regions)[..., 0]


@torch.no_grad()
def subset_benefits(
    model: nn.Module, batch: dict[str, Tensor], *, subsets: Sequence[Sequence[str]], regions: Sequence[str]
) -> Tensor:
    """Return the loss without ``regions`` minus that with each of K subsets of them alone: ``(B, T - 1, K)``, in nats."""
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}

    def losses(subset: Sequence[str]) -> Tensor:
        others = [region for region in regions if region not in subset]
        with ablated(model, *others) if others else nullcontext():
            return token_losses(model(**inputs).logits, batch["labels"].to(device))

    with evaluating(model):
        on = torch.stack([losses(subset) for subset in subsets], -1)
        return losses([])[..., None] - on


def find_region(benefits: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Return for each row the region whose benefit is the farthest above its own threshold; N where none is above.

    ``benefits`` are those of N regions, ``(B, N)``.

    >>> find_region(torch.tensor([[0.5, 2.0], [0.9, 1.5], [0.1, 0.2]]), [0.2, 1.0]).tolist()
    [1, 0, 2]
    """
    bounds = benefits.new_tensor(thresholds)
    above = benefits > bounds
    best = (benefits - bounds).masked_fill(~above, -torch.inf).argmax(1)
    return torch.where(above.any(1), best, benefits.shape[1])


def row_means(values: Tensor, targets: Tensor) -> Tensor:
    """Return each row's mean, ``(B,)``, of `token_losses` or their differences over the targets that have a loss."""
    return values.sum(1) / (targets[:, 1:] != IGNORED).sum(1).clamp(min=1)


def score_rows(
    trainer: Any,
    rows: Dataset,
    *,
    indices: np.ndarray,
    batch_size: int,
    separator: int | None = None,
    subsets: Sequence[Sequence[str]] | None = None,
) -> list[Tensor]:
    """Return the benefit of the trainer's regions to packed rows: for each index a tensor ``(1, K)``, in nats per token.

    The K ``subsets`` of regions are scored one by one; by default one, of all. With a ``separator``, the token that ends a
    document, each tensor has a line per document instead. Processes share the work, each with equally many batches of
    ``batch_size`` rows.
    """
    regions = trainer.routing.regions
    accelerator = trainer.accelerator
    each = -(-len(indices) // accelerator.num_processes)
    mine = np.resize(indices, each * accelerator.num_processes)[accelerator.process_index * each :][:each]
    collate = labeled_batches(trainer.data_collator, None)
    with trainer.compute_loss_context_manager(), torch.no_grad():
        scores = []
        for part in np.array_split(mine, -(-len(mine) // batch_size)):
            batch = collate([rows[int(index)] for index in part])
            benefits = subset_benefits(trainer.model, batch, subsets=subsets or [regions], regions=regions)
            scores.append(torch.stack([_batch_scores(own, batch, separator) for own in benefits.unbind(-1)], -1))
    found = accelerator.gather(torch.cat(scores).to(accelerator.device)).cpu()[: len(indices)]
    return [own[own[:, 0] != NO_DOCUMENT] for own in found]


def _batch_scores(benefit: Tensor, batch: dict[str, Tensor], separator: int | None) -> Tensor:
    """Return the benefit of each row, ``(B, 1)``, or at the first token of each document, ``(B, T)``."""
    if separator is None:
        return row_means(benefit, batch["labels"].to(benefit.device))[:, None]
    documents = document_of(batch["input_ids"].to(benefit.device), separator)
    counted = batch["labels"].to(benefit.device)[:, 1:] != IGNORED
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    return document_means(benefit, documents, counted).masked_fill(~begins, NO_DOCUMENT)
