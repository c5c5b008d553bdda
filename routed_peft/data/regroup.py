"""Documents within packed rows: means over documents, and rows regrouped by kinds of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List
from torch import Tensor

from routed_peft.data.columns import ROUTE_LABEL
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.data.packing import cut_rows


def document_of(ids: Tensor, separator: int) -> Tensor:
    """Return the index of each token's document within its row, ``(B, T)``; a separator belongs to the document it ends.

    >>> document_of(torch.tensor([[5, 0, 6, 7, 0, 8]]), separator=0).tolist()
    [[0, 0, 1, 1, 1, 2]]
    """
    ended = (ids == separator).long().cumsum(1)
    return torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)


def document_means(values: Tensor, documents: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return for each token the mean of its document, ``(B, T)``; 0 for a document of one token that begins a row.

    ``values``, ``(B, T - 1)``, are of the tokens after the first, which nothing predicts. ``documents``, ``(B, T)``, are
    those of `document_of`. Only the tokens ``counted``, ``(B, T - 1)`` and by default all, have values; others are 0.

    >>> documents = torch.tensor([[0, 0, 1, 1]])
    >>> document_means(torch.tensor([[1.0, 2.0, 4.0]]), documents).tolist()
    [[1.0, 1.0, 3.0, 3.0]]
    """
    zeros = values.new_zeros(documents.shape)
    sums = zeros.scatter_add(1, documents[:, 1:], values)
    counts = zeros.scatter_add(1, documents[:, 1:], torch.ones_like(values) if counted is None else counted.to(values))
    return (sums / counts.clamp(min=1)).gather(1, documents)


def regroup(
    rows: Dataset, is_forget: Sequence[Sequence[bool]], separator: int, begin: Sequence[int] = ()
) -> tuple[Dataset, list[str]]:
    """Regroup unlabeled rows, so that no row mixes forget documents with others, and return them with their labels.

    ``rows`` are of one length, with ``input_ids``, ``route_label``, and further columns only with a value for each token.
    ``is_forget`` says for each row whether each of its documents, which a ``separator`` ends, counts as forget. The rows
    returned have the same length; tokens that do not fill one are dropped.

    Where documents begin with the tokens ``begin`` (`routed_peft.data.beginnings`), as in rows of `pack` that have
    ``labels``, so does a row that begins in the middle of one.

    >>> rows = Dataset.from_dict({"input_ids": [[5, 0, 6, 0], [7, 0, 8, 0]], "route_label": ["unlabeled"] * 2})
    >>> found, labels = regroup(rows, [[True, False], [True, False]], separator=0)
    >>> found["input_ids"][:], labels
    ([[5, 0, 7, 0], [6, 0, 8, 0]], ['forget', 'retain'])
    """
    if not len(rows):  # all text came with labels
        return rows, []
    columns = {name: np.array(rows[name][:]) for name in rows.column_names if name != ROUTE_LABEL}
    ids = columns["input_ids"]
    documents = document_of(torch.from_numpy(ids), separator).numpy()
    forget = np.stack([np.array(own, dtype=bool)[index] for own, index in zip(is_forget, documents, strict=True)])
    begin = list(begin) if "labels" in columns and (ids[:, : len(begin)] == begin).all() else []
    _, piece, counts = np.unique(
        np.arange(len(ids))[:, None] * ids.shape[1] + documents, return_inverse=True, return_counts=True
    )
    sizes = counts[piece].reshape(ids.shape)
    whole = sizes > len(begin)  # a row may end within the beginning of a document
    parts: dict[str, list[Any]] = {name: [] for name in columns}
    labels = []
    for label, kind in ((FORGET, forget), (RETAIN, ~forget)):
        chosen = kind & whole
        streams = {name: values[chosen] for name, values in columns.items()}
        taken = counts[np.unique(piece.reshape(ids.shape)[chosen])]
        found = cut_rows(streams, taken.tolist(), length=ids.shape[1], begin=begin)
        for name, values in found.items():
            parts[name] += list(values)
        labels += [label] * len(found["input_ids"])
    return Dataset.from_dict(parts | {ROUTE_LABEL: [UNLABELED] * len(labels)}, features=rows.features), labels


def check_regroupable(rows: Dataset) -> None:
    """Raise ValueError unless rows are of one length and their columns can be regrouped by documents."""
    lengths = {len(ids) for ids in rows["input_ids"]}
    if len(lengths) != 1:
        raise ValueError(f"`separator` needs packed rows of one length, got {sorted(lengths)[:4]} and more")
    others = [name for name in rows.column_names if name != ROUTE_LABEL and not isinstance(rows.features[name], List)]
    if others:
        raise ValueError(f"`separator` regroups documents, and {others[0]!r} has one value for a whole row: remove it, "
                         "or give a list with a value for each token (`pack(…, per_token=[…])`)")  # fmt: skip
