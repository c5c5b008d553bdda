"""Packing of documents into rows of one length and one label; documents within such rows, and rows regrouped by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from routed_peft.data.beginnings import begin_tokens, document_tokens
from routed_peft.data.columns import ROUTE_LABEL, ROUTE_LABELS, ROUTE_WEIGHTS, check_texts
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.routes import IGNORED


def pack(
    ds: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    by: Sequence[str] | None = None,
    column: str = "text",
    seed: int = 0,
    per_token: Sequence[str] = (),
) -> Dataset:
    """Tokenize documents and lay them end to end, an end-of-sequence token after each, in rows of ``length`` tokens.

    Documents share a row only if they agree in every column of ``by``, so no row mixes labels: a forget document's loss
    cannot reach the base through a retain neighbor. Tokens that do not fill a row at the end of a group are dropped. The
    seed shuffles documents first and rows afterwards.

    A tokenizer that begins texts with a token of its own (Gemma's and Llama's ``<bos>``) does so before every document, and
    before a row that begins in the middle of one. ``labels`` then say which tokens have a loss. A beginning has none, nor
    has the first token after it in the middle of a document, like the first of every row where no tokenizer begins texts.

    Args:
        ds: a map-style dataset of documents; where it has no text, of their tokens, ``input_ids``.
        tokenizer: needs an end-of-sequence token.
        length: tokens per row.
        by: columns that a row must not mix; they are kept. None: ``route_label`` and ``side``, where they exist.
        column: name of the text's column.
        seed: same seed, same rows.
        per_token: further columns, which a row may mix; they become lists with the value of each token's document.

    Raises:
        ValueError: if a column is missing or has nulls, if ``ds`` is labeled by token, or if a value of the first
            column of ``by`` has too few tokens for a single row.

    >>> from routed_peft.data import train_tokenizer
    >>> ds = Dataset.from_dict({"text": ["a b", "x y", "c d"], "route_label": ["retain", "forget", "retain"]})
    >>> rows = pack(ds, train_tokenizer(ds["text"], vocab_size=258), length=4)
    >>> sorted(rows["route_label"]), set(map(len, rows["input_ids"]))
    (['forget', 'retain', 'retain'], {4})
    """
    if column == "text" and column not in ds.column_names and "input_ids" in ds.column_names:
        column = "input_ids"
    by = [name for name in (ROUTE_LABEL, "side") if name in ds.column_names] if by is None else list(by)
    _check(ds, tokenizer, length=length, by=[*by, *per_token], column=column)
    rng = np.random.default_rng(seed)
    ds = ds.select_columns([column, *by, *per_token]).with_format(None)
    kinds = {name: np.array(ds[name][:]) for name in per_token}
    keys = list(zip(*(ds[name][:] for name in by), strict=True)) if by else [()] * len(ds)
    tokens = tokenize(ds, tokenizer, column)
    groups: dict[tuple[Any, ...], list[int]] = {key: [] for key in sorted(set(keys))}
    for index in rng.permutation(len(ds)):
        groups[keys[index]].append(index)

    begin = begin_tokens(tokenizer)
    spread: dict[str, list[np.ndarray]] = {name: [] for name in ("input_ids", *(["labels"] * bool(begin)), *per_token)}
    values = []
    for key, members in groups.items():
        sizes = [len(tokens[index]) for index in members]
        streams = {"input_ids": np.concatenate([tokens[index] for index in members])}
        if begin:
            starts = np.cumsum([0, *sizes[:-1]])
            streams["labels"] = streams["input_ids"].copy()
            streams["labels"][(starts[:, None] + np.arange(len(begin))).ravel()] = IGNORED
        streams |= {name: np.repeat(own[members], sizes) for name, own in kinds.items()}
        rows = cut_rows(streams, sizes, length=length, begin=begin)
        values += [key] * len(rows["input_ids"])
        for name, found in rows.items():
            spread[name] += list(found)
    _check_filled(groups, values, by=by, length=length)
    order = rng.permutation(len(values))
    features = Features({name: List(Value("int32")) for name in spread} | {name: ds.features[name] for name in by})
    features |= {name: List(ds.features[name]) for name in per_token}
    columns: dict[str, list[Any]] = {name: [found[index] for index in order] for name, found in spread.items()}
    columns |= {name: [values[index][i] for index in order] for i, name in enumerate(by)}
    order_of_columns = ["input_ids", *by, *(name for name in spread if name != "input_ids")]
    return Dataset.from_dict({name: columns[name] for name in order_of_columns}, features=features)


def cut_rows(
    streams: Mapping[str, np.ndarray], sizes: Sequence[int], *, length: int, begin: Sequence[int]
) -> dict[str, np.ndarray]:
    """Cut documents laid end to end into rows of ``length`` tokens, as `pack` describes.

    ``streams`` are columns with a value for each token; ``sizes`` are the tokens of every document. With the tokens
    ``begin``, each document begins with them, and one of the columns is ``labels``.
    """
    places, inserted = _row_places(sizes, length=length, begin=len(begin))
    rows = {name: stream[places] for name, stream in streams.items()}
    if begin:
        rows["input_ids"][:, : len(begin)] = begin
        rows["labels"][inserted, : len(begin) + 1] = IGNORED
    return rows


def _row_places(sizes: Sequence[int], *, length: int, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where in a stream of documents each row's tokens stand, ``(N, length)``, and which rows begin with inserted ones.

    ``sizes`` are the tokens of every document, with its end and with the ``begin`` tokens that begin it. The first ``begin``
    places of rows with inserted tokens are fillers.
    """
    total = sum(sizes)
    if not begin:
        return np.arange(total // length * length).reshape(-1, length), np.zeros(total // length, dtype=bool)
    starts = np.cumsum([0, *sizes])
    rows, inserted, at = [], [], 0
    while at < total:
        start = starts[np.searchsorted(starts, at, side="right") - 1]
        middle = bool(at - start > begin)
        first = at - begin if middle else start  # no row begins within the beginning of a document
        rows.append(np.arange(first, first + length))
        inserted.append(middle)
        at = first + length
    kept = len(rows) - (at > total)
    return np.array(rows[:kept]).reshape(-1, length), np.array(inserted[:kept], dtype=bool)


def tokenize(ds: Dataset, tokenizer: PreTrainedTokenizerBase, column: str) -> list[np.ndarray]:
    """Return the tokens of each document, including those that begin it and the end-of-sequence token."""
    begin, eos = begin_tokens(tokenizer), tokenizer.eos_token_id
    given = column not in ds.column_names or column == "input_ids"
    batches = (batch["input_ids" if given else column] for batch in ds.iter(batch_size=1000))
    return [
        np.array([*begin, *ids, eos], dtype=np.int32)
        for batch in batches
        for ids in (_own_tokens(tokenizer, batch, begin) if given else document_tokens(tokenizer, batch))
    ]


def _own_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], begin: list[int]) -> Iterator[list[int]]:
    """Yield tokens that came with the data, without those that begin and end a document."""
    for ids in rows:
        if not ids or not all(isinstance(token, int) and 0 <= token < len(tokenizer) for token in ids):
            raise ValueError(f"`input_ids` must be tokens from 0 to {len(tokenizer) - 1}, the tokenizer's last, and at least "
                             f"one a row, got {str(ids)[:60]}: take the model's own tokenizer")  # fmt: skip
        ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
        yield ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _check(ds: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, by: Sequence[str], column: str) -> None:
    if length < 1 or tokenizer.eos_token_id is None:
        raise ValueError("packing needs a `length` of at least 1 and a `tokenizer` with an end-of-sequence token, got "
                         f"{length} and {tokenizer.eos_token!r}")  # fmt: skip
    if length < 2 + len(begin := begin_tokens(tokenizer)) and begin:
        raise ValueError(f"the tokenizer begins texts with {tokenizer.decode(begin)!r}, so `length` must be at least "
                         f"{2 + len(begin)}, got {length}")  # fmt: skip
    if missing := [name for name in (column, *by) if name not in ds.column_names]:
        raise ValueError(f"the dataset lacks the columns {missing}, got {ds.column_names}: see `column` and `by`")
    if labeled := [name for name in (ROUTE_LABELS, ROUTE_WEIGHTS) if name in ds.column_names]:
        raise ValueError(f"packing cannot carry {labeled}, one value per token: pack first, then label the packed rows")
    if not len(ds):
        raise ValueError("the dataset has no rows to pack")
    for name in (column, *by):
        if None in ds.with_format(None)[name][:]:
            raise ValueError(f"the column `{name}` has nulls, and packing needs a value in every row")
    if column != "input_ids":
        check_texts(ds, column)


def _check_filled(
    groups: dict[tuple[Any, ...], list[int]], values: list[Any], *, by: Sequence[str], length: int
) -> None:
    filled = {key[:1] for key in values}
    if lost := {key[:1] for key in groups} - filled:
        names = [key[0] for key in sorted(lost) if key]
        what = f"with `{by[0]}` in {names}" if names else "of the dataset"
        raise ValueError(f"the documents {what} do not fill one row of {length} tokens: take a smaller `length` or "
                         "more data")  # fmt: skip


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
    rows: Dataset,
    kinds: Sequence[Sequence[bool | str]],
    *,
    separator: int,
    begin: Sequence[int] = (),
    labels: Sequence[str] = (FORGET, RETAIN),
) -> tuple[Dataset, list[str]]:
    """Regroup unlabeled rows, so that no row mixes documents of different labels, and return them with their labels.

    ``rows`` are of one length, with ``input_ids``, ``route_label``, and further columns only with a value for each token.
    ``kinds`` has for each row the label, among ``labels``, of each of its documents, which a ``separator`` ends; true is
    forget, and false retain. The rows returned have the same length; tokens that do not fill one are dropped.

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
    names = [[kind if isinstance(kind, str) else FORGET if kind else RETAIN for kind in own] for own in kinds]
    label_of = np.stack([np.array(own, dtype=object)[index] for own, index in zip(names, documents, strict=True)])
    begin = list(begin) if "labels" in columns and (ids[:, : len(begin)] == begin).all() else []
    _, piece, counts = np.unique(
        np.arange(len(ids))[:, None] * ids.shape[1] + documents, return_inverse=True, return_counts=True
    )
    sizes = counts[piece].reshape(ids.shape)
    whole = sizes > len(begin)  # a row may end within the beginning of a document
    parts: dict[str, list[Any]] = {name: [] for name in columns}
    found_labels = []
    for label in labels:
        chosen = (label_of == label) & whole
        streams = {name: values[chosen] for name, values in columns.items()}
        taken = counts[np.unique(piece.reshape(ids.shape)[chosen])]
        found = cut_rows(streams, taken.tolist(), length=ids.shape[1], begin=begin)
        for name, values in found.items():
            parts[name] += list(values)
        found_labels += [label] * len(found["input_ids"])
    unlabeled = [UNLABELED] * len(found_labels)
    return Dataset.from_dict(parts | {ROUTE_LABEL: unlabeled}, features=rows.features), found_labels


def check_regroupable(rows: Dataset) -> None:
    """Raise ValueError unless rows are of one length and their columns can be regrouped by documents."""
    lengths = {len(ids) for ids in rows["input_ids"]}
    if len(lengths) != 1:
        raise ValueError(f"`separator` needs packed rows of one length, got {sorted(lengths)[:4]} and more")
    others = [name for name in rows.column_names if name != ROUTE_LABEL and not isinstance(rows.features[name], List)]
    if others:
        raise ValueError(f"`separator` regroups documents, and {others[0]!r} has one value for a whole row: remove it, "
                         "or give a list with a value for each token (`pack(…, per_token=[…])`)")  # fmt: skip
