"""Self-labels: relabel unlabeled rows during training by how much the region lowers their loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from routed_peft.data.beginnings import begin_tokens
from routed_peft.data.columns import ROUTE_LABEL, ROUTE_WEIGHTS, column_values
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.data.packing import check_regroupable, regroup
from routed_peft.data.schedule import draw_order
from routed_peft.routes import BASE
from routed_peft.training.changing_dataset import ChangingDataset
from routed_peft.training.self_label_config import SelfLabelConfig
from routed_peft.training.self_labeler import SelfLabeler


class SelfLabeledRows(ChangingDataset):
    r"""The rows of a run in training order, relabeled during the run by the region itself.

    At first the run takes labeled rows only, few of them forget. Then every unlabeled row is scored by the region's *benefit*,

    .. math:: b = L_{\text{ablated}} - L_{\text{on}},

    the row's mean loss with the regions ablated minus that with them on, in nats per token. Rows above a threshold between
    the benefits of labeled forget and retain rows (`routed_peft.training.benefit.benefit_threshold`) count as forget from then
    on, the others as retain, and the rest of the run is drawn anew from these labels.

    Name several ``regions``, and each has a benefit, of that region alone, and a threshold of its own, between labeled rows of
    it and of the core. A row then counts as the region whose benefit is the farthest above its threshold, if any is above.

    Pass it to `RoutedTrainer` as ``train_dataset``, with ``train_sampling_strategy="sequential"``. The trainer scores and
    relabels the rows, and saves the labels found in its checkpoints.

    Args:
        rows: packed rows with ``input_ids`` and ``route_label`` forget, retain or unlabeled; with ``regions``, one of
            these, ``core`` or unlabeled.
        count: rows of the whole run: steps times rows per step, over all processes.
        config: shares, threshold and times of scoring.
        seed: same seed, same run.
        token_weights: ``(V,)``: the base's gradient weight at every token of forget rows, such as
            `routed_peft.data.token_frequency_weights`, so that tokens common on both sides still teach the base. The route
            of forget rows must then leave the base its weight of 1, which these numbers multiply.
        separator: the token that ends a document (``tokenizer.eos_token_id``), to score documents instead of rows.
            Documents of one kind then share rows, which must be of one length, with other columns of values per token only.
        regions: the regions whose names label their rows, as for a `RegionSchedule`; by default all are one, for forget.
        core: with ``regions``, the label of rows of no region.
        **settings: deprecated: fields of `SelfLabelConfig`; pass ``config``.

    Raises:
        ValueError: where labeled rows of either side are missing, a column cannot be regrouped by documents, or a setting
            is for one region only.

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
        regions: Sequence[str] = (),
        core: str = RETAIN,
        **settings: Any,
    ) -> None:
        self.config = config = _with_settings(config or SelfLabelConfig(), settings)
        self.rows, self.seed, self.token_weights, self.separator = rows, seed, token_weights, separator
        self.begin: list[int] = []
        """Tokens with which the trainer's tokenizer begins documents."""
        if regions and (config.robust_share or token_weights is not None):
            raise ValueError("`robust_share` and `token_weights` are for one region without a name: leave them out beside "
                             "`regions`, and set `robust` of the `RegionSchedule`")  # fmt: skip
        self.regions = tuple(regions)
        self.kinds = (*regions, core) if regions else (FORGET, RETAIN)
        """Labels of rows: of those of each region, and last of all others."""
        if separator is not None:
            check_regroupable(rows)
        again = {} if config.score_again_at is None else {"score_again_at": config.score_again_at}
        self.score_at = {"labeled_first": config.labeled_first, **again}
        """Shares of the run after which rows are scored, by the setting that asks for it."""
        self._given = np.array(column_values(rows, ROUTE_LABEL), dtype=object)
        self._at_first = rows
        first = {"labeled_first": config.labeled_first, "first_forget_share": config.first_forget_share}
        share = config.forget_share
        order = draw_order(self._given.tolist(), count, forget_share=share, seed=seed, regions=self.kinds[:-1], **first)
        self._order_at_first = np.array(order)
        self.restore({})

    # Contract of `ChangingDataset`

    def callback(self, trainer: Any) -> TrainerCallback:
        """Return the callback that scores and relabels the rows.

        ValueError where routes or regions are missing, or the trainer would shuffle rows or fetch them in other processes.
        """
        if missing := [label for label in (*self.kinds, UNLABELED) if label not in trainer.routing.routes]:
            needed = ", ".join(map(repr, self.kinds))
            raise ValueError(f"`SelfLabeledRows` need routes for {needed} and 'unlabeled'; {missing} have "
                             "none: add them to `routes`")  # fmt: skip
        if unknown := [name for name in self.regions if name not in trainer.routing.regions]:
            raise ValueError(f"`regions` names {unknown}, and the model has {list(trainer.routing.regions)}: make them "
                             "the same")  # fmt: skip
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
        whether each, or each of its documents, ``is_forget`` (with `regions`, its ``labels``), and the number of ``tokens``
        scored."""
        for scoring in state.get("self_labels", []):
            self.apply_scoring(scoring)

    @property
    def forward_tokens(self) -> int:
        """Tokens of the forward passes of all scorings: one pass with regions off, and one with each on."""
        return (1 + len(self.kinds[:-1])) * self.scored_tokens

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
        found = scoring["labels" if self.regions else "is_forget"]
        self.relabel(np.array(scoring["rows"], dtype=int), found, scoring["start"])

    def relabel(self, scored: np.ndarray, found: np.ndarray | Sequence[Any], start: int) -> None:
        """Draw the run anew from its row ``start`` on; rows that could have been scored and were not are left out.

        ``found`` says for each row of ``scored`` (indices, see `rows_to_score`) whether it counts as forget, or what its label
        is; with a ``separator``, for each of its documents.
        """
        if self.separator is None:
            self.labels = self._given.copy()
            self.labels[scored] = found if self.regions else np.where(np.array(found, dtype=bool), FORGET, RETAIN)
            self.found_rows = np.sort(scored)
        else:  # rows of an earlier scoring stay, because the run has used them
            chosen = self._at_first.select(scored)
            new, labels = regroup(chosen, list(found), separator=self.separator, begin=self.begin, labels=self.kinds)
            self.found_rows = len(self.rows) + np.arange(len(labels))
            self.rows = concatenate_datasets([self.rows, new])
            self.labels = np.concatenate([self.labels, np.array(labels, dtype=object)])
        given = np.array([], dtype=int) if self.config.overrule else np.flatnonzero(self._given != UNLABELED)
        known = np.union1d(given, self.found_rows)
        names, share = self.labels[known].tolist(), self.config.forget_share
        sides, seed = self.kinds[:-1], [self.seed, start]
        order = draw_order(names, len(self) - start, forget_share=share, seed=seed, regions=sides)
        self._order[start:] = known[order]
        self._sides_in_order[start:] = labels = self.labels[self._order[start:]]
        robust = np.random.default_rng([self.seed, start]).random(len(labels)) < self.config.robust_share
        self._labels_in_order[start:] = np.where(robust & (labels == RETAIN), FORGET, labels)


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
