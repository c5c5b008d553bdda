"""Labels that the region finds itself: a region that has learnt its side knows an unlabelled row of it when it sees one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, concatenate_datasets
from torch import Tensor

from routed_peft.data.columns import ROUTE_LABEL, ROUTE_WEIGHTS, column_values
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.data.regroup import regroup
from routed_peft.data.schedule import draw_order
from routed_peft.routes import BASE

REFERENCE_ROWS = 256
THRESHOLDS = ("balanced", "median", "midpoint")
SETTINGS = (
    "labeled_first",
    "first_forget_share",
    "threshold",
    "score_again_at",
    "forget_share",
    "robust_share",
    "overrule",
)
"""What can be set of `SelfLabeledRows`, beside the seed; recipes and experiments use the same names."""


class SelfLabeledRows(torch.utils.data.Dataset[dict[str, Any]]):
    r"""The rows of a run in the order in which they are trained on, relabelled under way by the region itself.

    The first ``labeled_first`` of the run takes labelled rows only, a tenth of them forget: the region needs few to know its
    side, and the base, which learns from the others alone, would be late with more of them. Then the region is asked for its
    *benefit* to every unlabelled row,

    .. math:: b = L_{\text{ablated}} - L_{\text{on}},

    the row's mean loss with the regions ablated less that with them on, in nats per token. A row whose benefit is above a
    threshold between the means over labelled forget and labelled retain rows
    (`routed_peft.training.benefit.benefit_threshold`) is treated as forget from there on, the others as retain, and the
    rest of the run is laid out anew. As forget rows teach the base little or nothing, few of them are taken
    (``forget_share``).

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
            well that a label is wrong, and wrong labels move the mean of a side: use it with a ``first_forget_share`` of 0.5
            and the ``threshold`` "median", with which it is tested.
        seed: same seed, same run.
        first_forget_share: share of forget rows before the scoring.
        threshold: "balanced", "median" or "midpoint", see `routed_peft.training.benefit.benefit_threshold`.
        score_again_at: share of the run after which the region is asked once more, None for never. By then it knows its side
            better, and what it finds counts in place of what it found at first.
        separator: the token that ends a document (``tokenizer.eos_token_id``). It is then documents that are scored, and not
            rows, whatever they share a row with; documents of one kind share rows from there on. For rows of one length, whose
            further columns have a value for each token.
        token_weights: ``(V,)``: the base's gradient weight at every token of rows that count as forget, such as
            `routed_peft.data.token_frequency_weights`, so that tokens which both sides share still teach it. The route of
            forget rows must then leave the base its weight of 1, which these numbers multiply.

    Raises:
        ValueError: where a share is out of range, there are no labelled rows of both kinds to start from, or a column cannot be
            laid out anew by documents.

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
        separator: int | None = None,
        score_again_at: float | None = None,
    ) -> None:
        if not 0 < labeled_first < 1:
            raise ValueError(f"`labeled_first` is a share of the run, between 0 and 1; got {labeled_first}")
        if score_again_at is not None and not labeled_first < score_again_at < 1:
            raise ValueError(
                f"`score_again_at` is a share of the run, between `labeled_first` ({labeled_first}) and 1; got {score_again_at}"
            )
        if not 0 <= robust_share < 1:
            raise ValueError(f"`robust_share` is a share, at least 0 and less than 1; got {robust_share}")
        if threshold not in THRESHOLDS:
            raise ValueError(f"`threshold` must be one of {THRESHOLDS}, got {threshold!r}")
        self.rows, self.seed, self.threshold = rows, seed, threshold
        again = {} if score_again_at is None else {"score_again_at": score_again_at}
        self.score_at = {"labeled_first": labeled_first, **again}
        """Shares of the run after which rows are scored, by the argument that says so."""
        self.forget_share, self.robust_share, self.overrule = forget_share, robust_share, overrule
        self.token_weights, self.separator = token_weights, separator
        if separator is not None:
            check_columns(rows)
        self._given = np.array(column_values(rows, ROUTE_LABEL), dtype=object)
        self._at_first = rows
        order = draw_order(self._given.tolist(), count, labeled_first, forget_share, seed, first_forget_share)
        self._order_at_first = np.array(order)
        self.restore([])

    def restore(self, scorings: Sequence[dict[str, Any]]) -> None:
        """Lay out the run as in an interrupted one, by the `scorings` in its checkpoint; as at first without any."""
        self.rows = self._at_first
        self.labels = self._given.copy()
        """What every row counts as by now."""
        self.found_rows = np.array([], dtype=int)
        """Indices of the rows whose label was found."""
        self._order = self._order_at_first.copy()
        self._labels_in_order = self.labels[self._order]
        self._sides_in_order = self._labels_in_order.copy()
        self.scorings: list[dict[str, Any]] = []
        """What each scoring found: at which ``step``, the run's row ``start`` from which on it counts, the ``rows`` that were
        scored, whether each, or each of its documents, ``is_forget``, and how many ``tokens`` it took."""
        for scoring in scorings:
            self.add(scoring)

    def add(self, scoring: dict[str, Any]) -> None:
        """Relabel by what a scoring found, see `scorings`."""
        self.scorings.append(scoring)
        found = scoring["is_forget"] if self.separator is not None else np.array(scoring["is_forget"], dtype=bool)
        self.relabel(np.array(scoring["rows"], dtype=int), found, scoring["start"])

    def __len__(self) -> int:
        return len(self._order)

    @property
    def scored_tokens(self) -> int:
        """Tokens of the rows whose benefit was taken, those included against which the others were judged."""
        return sum(scoring["tokens"] for scoring in self.scorings)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, label = int(self._order[index]), self._labels_in_order[index]
        row = {**self.rows[number], ROUTE_LABEL: label}
        if self.token_weights is not None:
            row[ROUTE_WEIGHTS] = {BASE: self._base_weights(row["input_ids"], label, self._sides_in_order[index])}
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
        return self._shuffled(np.flatnonzero(self._given == label))[:count]

    def _shuffled(self, indices: np.ndarray) -> np.ndarray:
        return np.random.default_rng([self.seed, 1]).permutation(indices)

    def to_score(self, count: int) -> np.ndarray:
        """Return the indices of at most ``count`` rows that the region is asked about, in the order of `given`."""
        if not self.overrule:
            return self.given(UNLABELED, count)
        return self._shuffled(np.arange(len(self._given)))[:count]

    def relabel(self, scored: np.ndarray, is_forget: np.ndarray | Sequence[Sequence[bool]], start: int) -> None:
        """Lay out the run anew from its row ``start`` on; rows that could be scored and were not are not taken any more.

        Args:
            scored: indices of rows, see `to_score`.
            is_forget: for each, whether it counts as forget; with a ``separator``, whether each of its documents does.
            start: first row of the run that changes.
        """
        if self.separator is None:
            self.labels = self._given.copy()
            self.labels[scored] = np.where(is_forget, FORGET, RETAIN)
            self.found_rows = np.sort(scored)
        else:  # rows of an earlier scoring stay, for the run has gone through them
            found, labels = regroup(self._at_first.select(scored), list(is_forget), self.separator)
            self.found_rows = len(self.rows) + np.arange(len(labels))
            self.rows = concatenate_datasets([self.rows, found])
            self.labels = np.concatenate([self.labels, np.array(labels, dtype=object)])
        given = np.array([], dtype=int) if self.overrule else np.flatnonzero(self._given != UNLABELED)
        known = np.union1d(given, self.found_rows)
        order = draw_order(
            self.labels[known].tolist(), len(self) - start, forget_share=self.forget_share, seed=[self.seed, start]
        )
        self._order[start:] = known[order]
        self._sides_in_order[start:] = labels = self.labels[self._order[start:]]
        robust = np.random.default_rng([self.seed, start]).random(len(labels)) < self.robust_share
        self._labels_in_order[start:] = np.where(robust & (labels == RETAIN), FORGET, labels)


def check_columns(rows: Dataset) -> None:
    """Raise ValueError unless rows are of one length and their columns can be laid out anew, document by document."""
    lengths = {len(ids) for ids in rows["input_ids"]}
    if len(lengths) != 1:
        raise ValueError(f"`separator` needs packed rows of one length, got {sorted(lengths)[:4]} and more")
    others = [name for name in rows.column_names if name != ROUTE_LABEL and not isinstance(rows.features[name], List)]
    if others:
        raise ValueError(
            f"`separator` lays documents out anew, and {others[0]!r} has one value for a whole row: remove it, or give a list "
            "with a value for each token (`pack(…, per_token=[…])`)"
        )
