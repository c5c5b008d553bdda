"""Self-labels: relabel unlabeled rows during training by how much the region lowers their loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments

from routed_peft.data.beginnings import begin_tokens
from routed_peft.data.columns import ROUTE_LABEL, ROUTE_WEIGHTS, column_values
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.data.packing import check_regroupable, regroup
from routed_peft.data.schedule import draw_order
from routed_peft.routes import BASE
from routed_peft.training.benefit import benefit_threshold, middle_and_spread, score_rows
from routed_peft.training.changing_dataset import ChangingDataset
from routed_peft.training.self_label_config import SelfLabelConfig

REFERENCE_ROWS = 256
"""Labeled rows of each side that are scored to set the threshold, at most."""


class SelfLabeledRows(ChangingDataset):
    r"""The rows of a run in training order, relabeled during the run by the region itself.

    At first the run takes labeled rows only, few of them forget. Then every unlabeled row is scored by the region's *benefit*,

    .. math:: b = L_{\text{ablated}} - L_{\text{on}},

    the row's mean loss with the regions ablated minus that with them on, in nats per token. Rows above a threshold between
    the benefits of labeled forget and retain rows (`routed_peft.training.benefit.benefit_threshold`) count as forget from then
    on, the others as retain, and the rest of the run is drawn anew from these labels.

    Pass it to `RoutedTrainer` as ``train_dataset``, with ``train_sampling_strategy="sequential"``. The trainer scores and
    relabels the rows, and saves the labels found in its checkpoints.

    Args:
        rows: packed rows with ``input_ids`` and ``route_label`` forget, retain or unlabeled.
        count: rows of the whole run: steps times rows per step, over all processes.
        config: shares, threshold and times of scoring.
        seed: same seed, same run.
        token_weights: ``(V,)``: the base's gradient weight at every token of forget rows, such as
            `routed_peft.data.token_frequency_weights`, so that tokens common on both sides still teach the base. The route
            of forget rows must then leave the base its weight of 1, which these numbers multiply.
        separator: the token that ends a document (``tokenizer.eos_token_id``), to score documents instead of rows.
            Documents of one kind then share rows, which must be of one length, with other columns of values per token only.
        **settings: deprecated: fields of `SelfLabelConfig`; pass ``config``.

    Raises:
        ValueError: where labeled rows of either side are missing, or a column cannot be regrouped by documents.

    >>> rows = Dataset.from_dict({"input_ids": [[1], [2], [3], [4]],
    ...                           "route_label": ["forget", "retain", "unlabeled", "unlabeled"]})
    >>> run = SelfLabeledRows(rows, 8, config=SelfLabelConfig(labeled_first=0.25))
    >>> run.relabel(np.array([2, 3]), np.array([True, False]), start=2)
    >>> run.labels.tolist(), run[0]
    (['forget', 'retain', 'forget', 'retain'], {'input_ids': [2], 'route_label': 'retain'})
    """

    def __init__(
        self,
        rows: Dataset,
        count: int,
        *,
        config: SelfLabelConfig | None = None,
        seed: int = 0,
        token_weights: Tensor | None = None,
        separator: int | None = None,
        **settings: Any,
    ) -> None:
        self.config = config = _with_settings(config or SelfLabelConfig(), settings)
        self.rows, self.seed, self.token_weights, self.separator = rows, seed, token_weights, separator
        self.begin: list[int] = []
        """Tokens with which the trainer's tokenizer begins documents."""
        if separator is not None:
            check_regroupable(rows)
        again = {} if config.score_again_at is None else {"score_again_at": config.score_again_at}
        self.score_at = {"labeled_first": config.labeled_first, **again}
        """Shares of the run after which rows are scored, by the setting that asks for it."""
        self._given = np.array(column_values(rows, ROUTE_LABEL), dtype=object)
        self._at_first = rows
        first = {"labeled_first": config.labeled_first, "first_forget_share": config.first_forget_share}
        order = draw_order(self._given.tolist(), count, forget_share=config.forget_share, seed=seed, **first)
        self._order_at_first = np.array(order)
        self.restore({})

    # Contract of `ChangingDataset`

    def callback(self, trainer: Any) -> TrainerCallback:
        """Return the callback that scores and relabels the rows.

        ValueError where routes are missing, or the trainer would shuffle rows or fetch them in other processes.
        """
        if missing := [label for label in (FORGET, RETAIN, UNLABELED) if label not in trainer.routing.routes]:
            raise ValueError(f"`SelfLabeledRows` need routes for 'forget', 'retain' and 'unlabeled'; {missing} have "
                             "none: add them to `routes`")  # fmt: skip
        args = trainer.args
        if args.train_sampling_strategy != "sequential" or args.dataloader_num_workers:
            raise ValueError("`SelfLabeledRows` change during training: set `train_sampling_strategy` to 'sequential' "
                             f"and `dataloader_num_workers` to 0 (got {args.train_sampling_strategy!r} and "
                             f"{args.dataloader_num_workers})")  # fmt: skip
        if self.separator is not None and isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            self.begin = begin_tokens(trainer.processing_class)
        return SelfLabeler(trainer, self)

    def state(self) -> dict[str, Any]:
        """Return all scorings so far, from which the labels follow."""
        return {"self_labels": self.scorings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Lay out the run as an interrupted one was, from its `state`; as at the beginning where that is empty."""
        self.rows = self._at_first
        self.labels = self._given.copy()
        """Current label of every row."""
        self.found_rows = np.array([], dtype=int)
        """Indices of the rows whose label was found."""
        self._order = self._order_at_first.copy()
        self._labels_in_order = self.labels[self._order]
        self._sides_in_order = self._labels_in_order.copy()
        self.scorings: list[dict[str, Any]] = []
        """Result of each scoring: its ``step``, the run's row ``start`` from which it applies, the ``rows`` that were scored,
        whether each, or each of its documents, ``is_forget``, and the number of ``tokens`` scored."""
        for scoring in state.get("self_labels", []):
            self.apply_scoring(scoring)

    @property
    def forward_tokens(self) -> int:
        """Tokens of the forward passes of all scorings: two for every scored token."""
        return 2 * self.scored_tokens

    @property
    def scored_tokens(self) -> int:
        """Tokens of the rows that were scored, including the labeled rows that set the threshold."""
        return sum(scoring["tokens"] for scoring in self.scorings)

    # Rows of the run

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, label = int(self._order[index]), self._labels_in_order[index]
        row = {**self.rows[number], ROUTE_LABEL: label}
        if self.token_weights is not None:
            row[ROUTE_WEIGHTS] = {BASE: self._base_weights(row["input_ids"], label, self._sides_in_order[index])}
        return row

    def _base_weights(self, ids: Sequence[int], label: str, side: str) -> list[float]:
        """Return the multiplier of the route's base weight at every position, which predicts the token after it."""
        if label != FORGET:
            return [1.0] * len(ids)
        if side != FORGET:  # retain text that teaches the region alone
            return [0.0] * len(ids)
        assert self.token_weights is not None
        return [*self.token_weights[torch.tensor(ids[1:], dtype=torch.long)].tolist(), 0.0]

    def in_order(self, column: str) -> list[Any]:
        """Return a column's values in the run's current order."""
        values = self.rows[column][:]
        return [values[index] for index in self._order]

    # Scoring

    def rows_labeled(self, label: str | None, count: int | None = None) -> np.ndarray:
        """Return indices of rows that came with this label, or of all, in an order that is random but always the same."""
        indices = np.flatnonzero((self._given == label) | (label is None))
        return np.random.default_rng([self.seed, 1]).permutation(indices)[:count]

    def rows_to_score(self, count: int) -> np.ndarray:
        """Return indices of at most ``count`` rows to score, in the order of `rows_labeled`."""
        return self.rows_labeled(None if self.config.overrule else UNLABELED, count)

    def apply_scoring(self, scoring: dict[str, Any]) -> None:
        """Record the result of a scoring (see `scorings`) and relabel rows by it."""
        self.scorings.append(scoring)
        found = scoring["is_forget"] if self.separator is not None else np.array(scoring["is_forget"], dtype=bool)
        self.relabel(np.array(scoring["rows"], dtype=int), found, scoring["start"])

    def relabel(self, scored: np.ndarray, is_forget: np.ndarray | Sequence[Sequence[bool]], start: int) -> None:
        """Draw the run anew from its row ``start`` on; rows that could have been scored and were not are left out.

        ``is_forget`` says for each row of ``scored`` (indices, see `rows_to_score`) whether it counts as forget; with a
        ``separator``, whether each of its documents does.
        """
        if self.separator is None:
            self.labels = self._given.copy()
            self.labels[scored] = np.where(is_forget, FORGET, RETAIN)
            self.found_rows = np.sort(scored)
        else:  # rows of an earlier scoring stay, because the run has used them
            chosen, kinds = self._at_first.select(scored), list(is_forget)
            found, labels = regroup(chosen, kinds, separator=self.separator, begin=self.begin)
            self.found_rows = len(self.rows) + np.arange(len(labels))
            self.rows = concatenate_datasets([self.rows, found])
            self.labels = np.concatenate([self.labels, np.array(labels, dtype=object)])
        given = np.array([], dtype=int) if self.config.overrule else np.flatnonzero(self._given != UNLABELED)
        known = np.union1d(given, self.found_rows)
        names, share = self.labels[known].tolist(), self.config.forget_share
        order = draw_order(names, len(self) - start, forget_share=share, seed=[self.seed, start])
        self._order[start:] = known[order]
        self._sides_in_order[start:] = labels = self.labels[self._order[start:]]
        robust = np.random.default_rng([self.seed, start]).random(len(labels)) < self.config.robust_share
        self._labels_in_order[start:] = np.where(robust & (labels == RETAIN), FORGET, labels)


class SelfLabeler(TrainerCallback):
    """Scores and relabels `SelfLabeledRows` after the labeled start of a run."""

    def __init__(self, trainer: Any, rows: SelfLabeledRows) -> None:
        self.trainer, self.rows = trainer, rows

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Reset labels found in an earlier run of the same rows; check the run's length and the times of scoring."""
        if state.global_step == 0:
            self.rows.restore({})
        wanted = self._start(args, state.max_steps - 1)
        if len(self.rows) != wanted:
            raise ValueError(f"the rows are laid out for a run of {len(self.rows)} and it takes {wanted}, {state.max_steps} "
                             f"steps of {self._start(args, 0)}: make `SelfLabeledRows` with `count={wanted}`, or set "
                             "`max_steps`")  # fmt: skip
        steps = self._steps(state)
        last = max(steps)
        if len(steps) < len(self.rows.score_at) or self._start(args, last) >= len(self.rows):
            raise ValueError(f"`{steps[last]}`: after step {last} of {state.max_steps} there is nothing left to label: "
                             "score earlier, or train for longer")  # fmt: skip

    def _steps(self, state: TrainerState) -> dict[int, str]:
        """Return the steps after which rows are scored, with the setting that asks for each."""
        return {max(1, round(share * state.max_steps)): name for name, share in self.rows.score_at.items()}

    @staticmethod
    def _start(args: TrainingArguments, step: int) -> int:
        """Return the first row of the run that a scoring after this step changes."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return (step + 1) * per_step  # a loader may have fetched the next batch already

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Score rows after the labeled start, and a second time where `score_again_at` asks for it."""
        name = self._steps(state).get(state.global_step)
        if name is None:
            return
        rows, start = self.rows, self._start(args, state.global_step)
        scored, size = rows.rows_to_score(len(rows) - start), args.eval_batch_size
        known = [rows.rows_labeled(label, REFERENCE_ROWS) for label in (FORGET, RETAIN)]
        indices = np.concatenate([*known, scored])
        benefits = iter(score_rows(self.trainer, rows.rows, indices=indices, batch_size=size, separator=rows.separator))
        forget, retain = (torch.cat(list(islice(benefits, len(own)))) for own in known)
        threshold = self._threshold(forget, retain, f"`{name}`: after {state.global_step} steps")
        by_document = [(own > threshold).tolist() for own in benefits]  # of the rows that are left
        flat = [label for own in by_document for label in own]
        is_forget = by_document if rows.separator is not None else flat
        tokens = sum(len(ids) for ids in rows.rows.select(indices)["input_ids"])
        result = {"rows": scored.tolist(), "is_forget": is_forget, "tokens": tokens}
        rows.apply_scoring({"step": state.global_step, "start": start} | result)
        self.trainer.log({"self_labels_forget": sum(flat), "self_labels_retain": len(flat) - sum(flat)})

    def _threshold(self, forget: Tensor, retain: Tensor, moment: str) -> float:
        """Return the threshold between the benefits of either side; refuse a region that cannot tell the sides apart."""
        kind = self.rows.config.threshold
        (mu_f, _), (mu_r, _) = (middle_and_spread(side, kind) for side in (forget, retain))
        if not mu_f > mu_r:  # also where the model has diverged
            raise ValueError(f"{moment} the region helps labeled forget rows by {mu_f:.3f} nats per token and retain "
                f"rows by {mu_r:.3f}, so it cannot tell them apart: give it a longer start, or check the labels")  # fmt: skip
        return benefit_threshold(forget, retain, kind)


def _with_settings(config: SelfLabelConfig, settings: Mapping[str, Any]) -> SelfLabelConfig:
    """Return ``config`` with the deprecated keyword arguments put in."""
    if not isinstance(config, SelfLabelConfig):
        raise ValueError(f"`config` is a `SelfLabelConfig`, got {config!r}: write "
                         "`SelfLabelConfig(labeled_first=0.15)`")  # fmt: skip
    if settings:
        warnings.warn(
            f"`SelfLabeledRows(..., {', '.join(settings)})` is deprecated: pass `config=SelfLabelConfig(...)`",
            DeprecationWarning,
            stacklevel=3,
        )
    return replace(config, **settings)
