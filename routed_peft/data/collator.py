"""Collator: pads rows of a dataset into a batch, with a label for every position."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from routed_peft.data.columns import (
    ROUTE_COLUMNS,
    ROUTE_ENVIRONMENT,
    ROUTE_LABEL,
    ROUTE_LABELS,
    ROUTE_WEIGHTS,
    route_column,
    route_index,
)
from routed_peft.data.padding import check_mask, check_unpacked, infer_mask
from routed_peft.routes import IGNORED

Feature = Mapping[str, Any]
Align = Callable[[list[list[Any]], str], Tensor]


@dataclass
class RoutedCollator:
    """Pad tokenized rows of mixed labels into a batch, and turn their labels into indices of routes.

    In a dataset a token's label describes that token. In the batch it stands one position to the left, at the position that
    *predicts* the token, because its loss arises there. This is the only place that shifts labels.

    Attributes:
        tokenizer: gives the padding token, the padding side and the truncation side.
        routes: label -> route; only names and their order matter here. None, as in evaluation, drops labels.
        max_length: tokens to which longer rows are cut, with their labels and weights.
        pad_to_multiple_of: positions; the batch's length is a multiple of it.
        class_names: names of ClassLabel integers (`class_names` finds them in a dataset).

    Calling it takes rows with ``input_ids``, either ``route_label`` or ``route_labels``, and, each in every row or in none,
    ``attention_mask`` (else 0 at padding tokens at either end), ``labels``, ``route_weights`` (by group: a number, or one per
    position) and ``route_environment``, which passes through as a list. It returns ``(B, T)`` tensors ``input_ids``,
    ``attention_mask`` and ``labels``; the integer ``route_label`` ``(B,)`` or ``route_labels`` ``(B, T)``, shifted, -100 at
    padding and at the last token; and ``route_weights``, ``{group: (B,) or (B, T)}``, not shifted, 1 at padding. The first
    token after left padding has no loss, as on the right, where nothing predicts it.

    Raises:
        ValueError: if a row has no label, both kinds, a null, a label without a route, labels or weights of another length
            than its tokens, padding that cannot be told from text, or documents kept apart by a mask or ``position_ids``.

    >>> from routed_peft import presets
    >>> from routed_peft.data import train_tokenizer
    >>> collate = RoutedCollator(train_tokenizer(["a"], vocab_size=258), presets.sgtm("forget"))
    >>> batch = collate([{"input_ids": [5, 6, 7], "route_labels": ["retain", "forget", "retain"]},
    ...                  {"input_ids": [8, 9], "route_labels": ["unlabeled", "unlabeled"]}])
    >>> batch["route_labels"]
    tensor([[   0,    1, -100],
            [   2, -100, -100]])
    """

    tokenizer: PreTrainedTokenizerBase
    routes: Mapping[str, Any] | None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1 or None, got {self.max_length}")

    def with_routes(self, routes: Mapping[str, Any] | None, class_names: Sequence[str] | None = None) -> RoutedCollator:
        """Return a copy for other ``routes``, and other names of integers where ``class_names`` gives them."""
        other = copy.copy(self)
        other.routes, other.class_names = routes, class_names or self.class_names
        return other

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Make a batch of the rows ``features``."""
        if self.routes is None:
            features = [{name: row[name] for name in row if name not in ROUTE_COLUMNS} for row in features]
        keys = common_keys(features)
        check_unpacked(keys)
        if self.routes is not None:
            route_column(keys)
        rows = [self._tokens(row, keys) for row in features]
        length = max(len(row["input_ids"]) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        length = math.ceil(length / multiple) * multiple
        batch: dict[str, Any] = {name: self._pad([row[name] for row in rows], name, length) for name in rows[0]}
        padding = batch["attention_mask"] == 0
        batch["labels"].masked_fill_(padding, IGNORED)
        batch["labels"][:, 1:].masked_fill_(padding[:, :-1], IGNORED)  # padding predicts nothing
        if self.routes is not None:
            align = lambda values, name: self._pad([self._cut(row) for row in values], name, length)
            label_batch(batch, features, keys=keys, routes=self.routes, names=self.class_names, align=align)
        return batch

    def _tokens(self, row: Feature, keys: Sequence[str]) -> dict[str, list[Any]]:
        """Read the columns of a row that have one value per token, checked and cut to `max_length`."""
        ids = plain(row["input_ids"])
        columns = {"input_ids": ids, "labels": ids}
        columns |= {name: per_token(row, name) for name in ("attention_mask", "labels") if name in keys}
        if "attention_mask" in keys:
            check_mask(columns["attention_mask"])
        else:
            trained = [label != IGNORED for label in columns["labels"]]
            columns["attention_mask"] = infer_mask(ids, trained, self.tokenizer)
        return {name: self._cut(values) for name, values in columns.items()}

    def _cut(self, values: list[Any]) -> list[Any]:
        if self.max_length is None:
            return values
        return values[-self.max_length :] if self.tokenizer.truncation_side == "left" else values[: self.max_length]

    def _pad(self, rows: Sequence[list[Any]], name: str, length: int) -> Tensor:
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, ROUTE_WEIGHTS: 1.0}.get(name, IGNORED)
        if fill is None:
            if any(len(row) < length for row in rows):
                raise ValueError("`tokenizer` has no padding token, which rows of unequal length need: "
                                 "set `tokenizer.pad_token = tokenizer.eos_token`")  # fmt: skip
            fill = 0
        left = self.tokenizer.padding_side == "left"
        gaps = [[fill] * (length - len(row)) for row in rows]
        padded = [gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)]
        return torch.tensor(padded, dtype=torch.float32 if name == ROUTE_WEIGHTS else torch.long)


def label_batch(
    batch: Any,
    features: Sequence[Feature],
    *,
    keys: Collection[str],
    routes: Mapping[str, Any],
    names: Sequence[str] | None,
    align: Align,
) -> None:
    """Add to the ``batch`` of the rows ``features`` their route columns among ``keys``, labels as indices of ``routes``.

    ``names`` are those of integer labels; ``align`` pads lists of one value per token, given with the name of their column.
    """
    if ROUTE_LABEL in keys:
        batch[ROUTE_LABEL] = torch.tensor([route_index(row[ROUTE_LABEL], routes, names=names) for row in features])
    else:
        rows = [per_token(row, ROUTE_LABELS) for row in features]
        found = [[route_index(label, routes, names=names, per_token=True) for label in row] for row in rows]
        labels, mask = align(found, ROUTE_LABELS), batch.get("attention_mask")
        known = isinstance(mask, Tensor) and mask.shape == labels.shape
        padding = mask == 0 if known else torch.zeros_like(labels, dtype=torch.bool)
        shifted = shift(labels.masked_fill(padding, IGNORED))
        batch[ROUTE_LABELS] = shifted.masked_fill(padding, IGNORED)  # left padding got the first token's label
    if ROUTE_WEIGHTS in keys:
        batch[ROUTE_WEIGHTS] = _weight_tensors(features, align)
    if ROUTE_ENVIRONMENT in keys:
        batch[ROUTE_ENVIRONMENT] = [row[ROUTE_ENVIRONMENT] for row in features]


def _weight_tensors(features: Sequence[Feature], align: Align) -> dict[str, Tensor]:
    """Make ``{group: (B,) or (B, T)}`` of the column ``route_weights``."""
    weights = {}
    for group in features[0][ROUTE_WEIGHTS]:
        values = [plain(row[ROUTE_WEIGHTS].get(group)) for row in features]
        per_position = [isinstance(value, list) for value in values]
        if any(value is None for value in values) or any(per_position) != all(per_position):
            raise ValueError(f"`{ROUTE_WEIGHTS}` needs {group!r} in every row, always as a number or always as a list")
        if any(per_position):
            for value, row in zip(values, features, strict=True):
                _check_length(ROUTE_WEIGHTS, value, row["input_ids"])
            weights[group] = align(values, ROUTE_WEIGHTS)
        else:
            weights[group] = torch.tensor(values, dtype=torch.float32)
        if not weights[group].isfinite().all():
            raise ValueError(f"`{ROUTE_WEIGHTS}` must be finite numbers, got {weights[group]} for {group!r}")
    return weights


def shift(labels: Tensor) -> Tensor:
    """Move token labels ``(B, T)`` from the token to the position before it, which predicts it; the last gets -100.

    >>> shift(torch.tensor([[0, 1, 2]]))
    tensor([[   1,    2, -100]])
    """
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def common_keys(features: Sequence[Feature], needs: Sequence[str] = ("input_ids",)) -> list[str]:
    """Return the columns of a batch's rows, without those that are null.

    ValueError if a row lacks a column of ``needs`` or a label, or only some rows have an optional column.
    """
    keys = set(features[0])
    for name in ("input_ids", "attention_mask", "labels", *ROUTE_COLUMNS):
        missing = [i for i, row in enumerate(features) if row.get(name) is None]
        if name in needs and missing:
            raise ValueError(f"every row needs `{name}`, got the columns {sorted(keys)}: tokenize the text first")
        if missing and len(missing) < len(features):
            raise ValueError(f"the column `{name}` is in some rows and missing or null in others, such as {missing[0]}")
        if missing and name in keys and name in (ROUTE_LABEL, ROUTE_LABELS):
            raise ValueError(f'the column `{name}` is null: every row needs a label; "unlabeled" is a label too')
    return [name for name in keys if features[0][name] is not None]


def plain(values: Any) -> Any:
    """Return a tensor, array or tuple as a list; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else list(values) if isinstance(values, tuple) else values


def per_token(row: Feature, name: str) -> list[Any]:
    """Return a column of a row that has one value per token."""
    values = plain(row[name])
    _check_length(name, values, plain(row.get("input_ids")) or [])
    return values


def _check_length(name: str, values: Any, ids: Any) -> None:
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != len(ids):
        got = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"`{name}` needs one value per token: got {got}, expected {len(ids)} values")
