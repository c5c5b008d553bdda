"""Labels that the region finds itself: a region that has learnt its side knows an unlabelled row of it when it sees one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from routed_peft.ablation import ablated
from routed_peft.data.columns import ROUTE_LABEL, ROUTE_WEIGHTS, column_values
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.data.schedule import draw_order
from routed_peft.routes import BASE, IGNORED

if TYPE_CHECKING:
    from routed_peft.training.mixin import RoutingMixin

REFERENCE_ROWS = 256
THRESHOLDS = ("balanced", "midpoint")
SETTINGS = ("labeled_first", "first_forget_share", "threshold", "forget_share", "robust_share", "overrule")
"""What can be set of `SelfLabeledRows`, beside the seed; recipes and experiments use the same names."""


class SelfLabeledRows(torch.utils.data.Dataset[dict[str, Any]]):
    r"""The rows of a run in the order in which they are trained on, relabelled under way by the region itself.

    The first ``labeled_first`` of the run takes labelled rows only, a tenth of them forget: the region needs few to know its
    side, and the base, which learns from the others alone, would be late with more of them. Then the region is asked for its
    *benefit* to every unlabelled row,

    .. math:: b = L_{\text{ablated}} - L_{\text{on}},

    the row's mean loss with the regions ablated less that with them on, in nats per token. A row whose benefit is above a
    threshold between the means over labelled forget and labelled retain rows (`benefit_threshold`) is treated as forget from
    there on, the others as retain, and the rest of the run is laid out anew. As forget rows teach the base little or
    nothing, few of them are taken (``forget_share``).

    Give it to `RoutedTrainer` as ``train_dataset``, with ``train_sampling_strategy="sequential"``; the trainer scores,
    relabels, and keeps what was found in its checkpoints.

    Args:
        rows: packed rows with ``input_ids`` and ``route_label`` forget, retain or unlabeled.
        count: rows of the whole run: steps times rows per step, over all processes.
        labeled_first: share of the run before the scoring.
        forget_share: share of forget rows, labelled or found, in the rest of the run; None for their share in ``rows``.
        robust_share: share of the retain rows, labelled or found, that are trained like forget rows: with the region on,
            and teaching the region. Otherwise it never sees retain text, and the model *with* its region is bad at it
            (compare core-robustness of GRAM, arXiv 2607.08077).
        overrule: whether labelled rows are asked too, and what is found counts in place of what was given; for labels that may
            be wrong. Otherwise a wrong label is obeyed to the end of the run. A region that has seen few forget rows tells less
            well that a label is wrong: use it with a ``first_forget_share`` of 0.5, with which it is tested.
        seed: same seed, same run.
        first_forget_share: share of forget rows before the scoring.
        threshold: "balanced" or "midpoint", see `benefit_threshold`.
        token_weights: ``(V,)``: the base's gradient weight at every token of rows that count as forget, such as
            `routed_peft.data.token_frequency_weights`, so that tokens which both sides share still teach it. The route of
            forget rows must then leave the base its weight of 1, which these numbers multiply.

    Raises:
        ValueError: where a share is out of range, or there are no labelled rows of both kinds to start from.

    Example:
        >>> rows = Dataset.from_dict({"input_ids": [[1], [2], [3], [4]],
        ...                           "route_label": ["forget", "retain", "unlabeled", "unlabeled"]})
        >>> run = SelfLabeledRows(rows, 8, labeled_first=0.25)
        >>> run.relabel(np.array([2, 3]), np.array([True, False]), start=2)
        >>> run.labels.tolist(), run[0]
        (['forget', 'retain', 'forget', 'retain'], {'input_ids': [2], 'route_label': 'retain'})
    """

    def __init__(
        self,
        rows: Dataset,
        count: int,
        labeled_first: float = 0.15,
        forget_share: float | None = 0.1,
        robust_share: float = 0.0,
        seed: int = 0,
        overrule: bool = False,
        first_forget_share: float = 0.1,
        threshold: str = "balanced",
        token_weights: Tensor | None = None,
    ) -> None:
        if not 0 < labeled_first < 1:
            raise ValueError(f"`labeled_first` is a share of the run, between 0 and 1; got {labeled_first}")
        if not 0 <= robust_share < 1:
            raise ValueError(f"`robust_share` is a share, at least 0 and less than 1; got {robust_share}")
        if threshold not in THRESHOLDS:
            raise ValueError(f"`threshold` must be one of {THRESHOLDS}, got {threshold!r}")
        self.rows, self.labeled_first, self.seed, self.threshold = rows, labeled_first, seed, threshold
        self.forget_share, self.robust_share, self.overrule = forget_share, robust_share, overrule
        self.token_weights = token_weights
        self.labels = np.array(column_values(rows, ROUTE_LABEL), dtype=object)
        """What every row counts as by now."""
        self._given = self.labels.copy()
        order = draw_order(self._given.tolist(), count, labeled_first, forget_share, seed, first_forget_share)
        self._order = np.array(order)
        self._labels_in_order = self.labels[self._order]
        self.found: dict[str, Any] = {}
        """What the scoring found: at which ``step``, the run's row ``start`` from which on it counts, the ``rows`` that were
        scored, and whether each ``is_forget``."""

    def __len__(self) -> int:
        return len(self._order)

    @property
    def scored_tokens(self) -> int:
        """Tokens of the rows whose benefit was taken, those included against which the others were judged."""
        if not self.found:
            return 0
        known = [self.given(label, REFERENCE_ROWS).tolist() for label in (FORGET, RETAIN)]
        rows = self.rows.select([*self.found["rows"], *known[0], *known[1]])
        return sum(len(ids) for ids in rows["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, label = int(self._order[index]), self._labels_in_order[index]
        row = {**self.rows[number], ROUTE_LABEL: label}
        if self.token_weights is not None:
            row[ROUTE_WEIGHTS] = {BASE: self._base_weights(row["input_ids"], label, self.labels[number])}
        return row

    def _base_weights(self, ids: Sequence[int], label: str, side: str) -> list[float]:
        """Return what the route's base weight is multiplied by at every position, which predicts the token after it."""
        if label != FORGET:
            return [1.0] * len(ids)
        if side != FORGET:  # retain text that teaches the region alone
            return [0.0] * len(ids)
        assert self.token_weights is not None
        return [*self.token_weights[torch.tensor(ids[1:], dtype=torch.long)].tolist(), 0.0]

    def in_order(self, column: str) -> list[Any]:
        """Return a column's values in the order of the run, as it now is."""
        values = self.rows[column][:]
        return [values[index] for index in self._order]

    def given(self, label: str, count: int | None = None) -> np.ndarray:
        """Return the indices of rows that came with this label, in an order that is random but always the same."""
        return np.random.default_rng([self.seed, 1]).permutation(np.flatnonzero(self._given == label))[:count]

    def to_score(self, count: int) -> np.ndarray:
        """Return the indices of at most ``count`` rows that the region is asked about, in the order of `given`."""
        if not self.overrule:
            return self.given(UNLABELED, count)
        return np.random.default_rng([self.seed, 1]).permutation(len(self._given))[:count]

    def relabel(self, scored: np.ndarray, is_forget: np.ndarray, start: int) -> None:
        """Lay out the run anew from its row ``start`` on; rows that could be scored and were not are not taken any more.

        Args:
            scored: indices of rows, see `to_score`.
            is_forget: for each, whether it counts as forget.
            start: first row of the run that changes.
        """
        self.labels = self._given.copy()
        self.labels[scored] = np.where(is_forget, FORGET, RETAIN)
        known = np.sort(scored) if self.overrule else np.flatnonzero(self.labels != UNLABELED)
        order = draw_order(
            self.labels[known].tolist(), len(self) - start, forget_share=self.forget_share, seed=[self.seed, start]
        )
        self._order[start:] = known[order]
        labels = self.labels[self._order[start:]]
        robust = np.random.default_rng([self.seed, start]).random(len(labels)) < self.robust_share
        self._labels_in_order[start:] = np.where(robust & (labels == RETAIN), FORGET, labels)

    def restore(self, found: dict[str, Any]) -> None:
        """Relabel as in an interrupted run, from what its checkpoint says was `found`."""
        self.found = dict(found)
        if found:
            self.relabel(np.array(found["rows"], dtype=int), np.array(found["is_forget"], dtype=bool), found["start"])


class SelfLabeler(TrainerCallback):
    """Scores and relabels `SelfLabeledRows` when their start is over."""

    def __init__(self, trainer: RoutingMixin, rows: SelfLabeledRows) -> None:
        self.trainer, self.rows = trainer, rows

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score rows once the start is over."""
        if state.global_step != max(1, round(self.rows.labeled_first * state.max_steps)):
            return
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        start = (state.global_step + 1) * per_step  # a loader may have fetched the next batch already
        if start >= len(self.rows):
            return
        scored = self.rows.to_score(len(self.rows) - start)
        known = [self.rows.given(label, REFERENCE_ROWS) for label in (FORGET, RETAIN)]
        benefit = self._benefit(np.concatenate([*known, scored]), args.eval_batch_size)
        forget, retain, benefit = benefit.split([len(known[0]), len(known[1]), len(scored)])
        if forget.mean() <= retain.mean():
            raise ValueError(
                f"`labeled_first`: after {state.global_step} steps the region helps labelled forget rows by "
                f"{forget.mean():.3f} nats per token and retain rows by {retain.mean():.3f}, so it cannot tell them "
                "apart: give it a longer start, or check the labels"
            )
        is_forget = (benefit > benefit_threshold(forget, retain, self.rows.threshold)).numpy()
        self.rows.relabel(scored, is_forget, start)
        about = {"step": state.global_step, "start": start}
        self.rows.found = about | {"rows": scored.tolist(), "is_forget": is_forget.tolist()}
        self.trainer.log({"self_labels_forget": int(is_forget.sum()), "self_labels_retain": int((~is_forget).sum())})

    def _benefit(self, indices: np.ndarray, batch_size: int) -> Tensor:
        """Return the benefit of rows, ``(N,)``; processes share the work, each with equally many batches."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        each = -(-len(indices) // accelerator.num_processes)
        mine = np.resize(indices, each * accelerator.num_processes)[accelerator.process_index * each :][:each]
        with trainer.compute_loss_context_manager(), torch.no_grad():
            scores = [
                region_benefit(
                    trainer.model, trainer.data_collator([self._row(i) for i in part]), trainer.routing.regions
                )
                for part in np.array_split(mine, -(-len(mine) // batch_size))
            ]
        return accelerator.gather(torch.cat(scores).to(accelerator.device)).cpu()[: len(indices)]

    def _row(self, index: int) -> dict[str, Any]:
        return {**self.rows.rows[int(index)], ROUTE_LABEL: UNLABELED}


def benefit_threshold(forget: Tensor, retain: Tensor, kind: str = "balanced") -> float:
    r"""Return the benefit above which a row counts as forget.

    Forget rows differ among themselves more than retain rows do. The threshold is therefore "balanced": as
    many standard deviations below the mean of the former as above that of the latter,

    .. math:: t = \frac{\mu_f \sigma_r + \mu_r \sigma_f}{\sigma_f + \sigma_r},

    where normal distributions would err as often on either side. "midpoint" is :math:`(\mu_f + \mu_r) / 2`.

    Args:
        forget: benefits of labelled forget rows, ``(N,)``, in nats per token.
        retain: benefits of labelled retain rows, ``(M,)``.
        kind: "balanced" or "midpoint".

    Example:
        >>> forget, retain = torch.tensor([0.0, 2.0]), torch.tensor([-1.25, -0.75])
        >>> round(benefit_threshold(forget, retain), 2), benefit_threshold(forget, retain, "midpoint")
        (-0.6, 0.0)
    """
    above, below = forget.double().std(correction=0), retain.double().std(correction=0)
    if kind == "midpoint" or above + below == 0:
        above = below = torch.ones(())
    return float((forget.mean() * below + retain.mean() * above) / (above + below))


@torch.no_grad()
def region_benefit(model: nn.Module, batch: dict[str, Tensor], regions: Sequence[str]) -> Tensor:
    """Return how much lower each row's mean loss is with the regions than without, ``(B,)``, in nats per token.

    Args:
        model: with `regions`.
        batch: ``input_ids``, ``labels`` and ``attention_mask``, ``(B, T)``; other keys are left out.
        regions: their names.
    """
    device, training = next(model.parameters()).device, model.training
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    model.eval()
    on = row_losses(model(**inputs).logits, batch["labels"].to(device))
    with ablated(model, *regions):
        off = row_losses(model(**inputs).logits, batch["labels"].to(device))
    model.train(training)
    return off - on


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's mean next-token loss, ``(B,)``, in nats per token.

    Args:
        logits: ``(B, T, V)``.
        targets: ``(B, T)``, -100 where there is no loss.
    """
    predicted, wanted = logits[:, :-1].float(), targets[:, 1:]
    losses = F.cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(wanted).sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)
