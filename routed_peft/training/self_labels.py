"""Labels that the region finds itself: a region that has learnt its side knows an unlabelled row of it when it sees one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.routes import IGNORED, Routes

MODES = ("none", "forget", "both")


class SelfLabels:
    r"""Decides by *region benefit* which unlabelled rows to treat as labelled.

    .. math:: b = L_{\text{ablated}} - L_{\text{on}}

    is a row's mean loss with the regions ablated, less that with them on, in nats per token. Running means of b over
    labelled forget and labelled retain rows give a midpoint; an unlabelled row above it is treated as forget, and, in the
    mode ``"both"``, one below it as retain. Until both means exist, and while the forget mean is not the larger, rows stay
    as they are.

    Args:
        routes: must have the labels forget, retain and unlabeled.
        mode: ``"forget"`` or ``"both"``.
        decay: of the running means, per update.

    Raises:
        ValueError: on an unknown mode, or where a label is missing.

    Example:
        >>> from routed_peft import presets
        >>> labels = SelfLabels(presets.sgtm(), "both")
        >>> labels.update(sums=torch.tensor([4.0, 0.2]), counts=torch.tensor([2.0, 2.0]))
        >>> labels.assign(torch.tensor([0, 2, 2]), torch.tensor([2.0, 1.9, 0.0]))
        tensor([0, 0, 1])
    """

    def __init__(self, routes: Routes, mode: str = "both", decay: float = 0.98) -> None:
        if mode not in MODES[1:]:
            raise ValueError(f"`self_labels` is one of {MODES}, got {mode!r}")
        missing = [label for label in (FORGET, RETAIN, UNLABELED) if label not in routes]
        if missing:
            raise ValueError(f"`self_labels` needs routes for 'forget', 'retain' and 'unlabeled'; {missing} have none")
        names = list(routes)
        self.forget, self.retain, self.unlabeled = (names.index(label) for label in (FORGET, RETAIN, UNLABELED))
        self.mode, self.decay = mode, decay
        self.means: list[float | None] = [None, None]
        """Running mean benefit of labelled forget and of labelled retain rows, in nats per token."""

    def sums(self, labels: Tensor, benefit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed benefit of labelled forget and retain rows, ``(2,)``, and their counts, ``(2,)``."""
        masks = torch.stack([labels == self.forget, labels == self.retain]).float()
        return masks @ benefit.float(), masks.sum(1)

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Move the running means; under several processes pass what `sums` returned, added up over all."""
        for i, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                former, new = self.means[i], total / count
                self.means[i] = new if former is None else self.decay * former + (1 - self.decay) * new

    def assign(self, labels: Tensor, benefit: Tensor) -> Tensor:
        """Return ``labels`` ``(B,)`` with unlabelled rows replaced as their ``benefit`` ``(B,)`` says."""
        forget, retain = self.means
        if forget is None or retain is None or forget <= retain:
            return labels
        unlabeled, above = labels == self.unlabeled, benefit.to(labels.device) > (forget + retain) / 2
        labels = torch.where(unlabeled & above, self.forget, labels)
        return torch.where(unlabeled & ~above, self.retain, labels) if self.mode == "both" else labels


@torch.no_grad()
def row_losses(logits: Callable[[], Tensor], targets: Tensor) -> Tensor:
    """Return each row's mean next-token loss, ``(B,)``, in nats per token.

    Args:
        logits: computes ``(B, T, V)``.
        targets: ``(B, T)``, -100 where there is no loss.
    """
    predicted, wanted = logits()[:, :-1].float(), targets[:, 1:]
    losses = F.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(wanted).sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)
