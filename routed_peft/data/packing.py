"""Packing of documents into rows of one length and one label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from routed_peft.data.beginnings import begin_tokens, document_tokens
from routed_peft.data.columns import ROUTE_LABEL, ROUTE_LABELS, ROUTE_WEIGHTS, check_texts
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
