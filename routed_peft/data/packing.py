"""Packing of documents into rows of one length and one label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from routed_peft.data.columns import ROUTE_LABEL, ROUTE_LABELS, ROUTE_WEIGHTS
from routed_peft.deprecation import formerly_positional


@formerly_positional("length", "by", "column", "seed", "per_token")
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

    Args:
        ds: a map-style dataset of documents.
        tokenizer: needs an end-of-sequence token, the only special token added here.
        length: tokens per row.
        by: columns that a row must not mix; they are kept. None: ``route_label`` and ``side``, where they exist.
        column: name of the text's column.
        seed: same seed, same rows.
        per_token: further columns, which a row may mix; they become lists with the value of each token's document.

    Returns:
        A shuffled dataset of ``input_ids`` and the columns of ``by`` and ``per_token``.

    Raises:
        ValueError: if a column is missing or has nulls, if ``ds`` is labeled by token, or if a value of the first
            column of ``by`` has too few tokens for a single row.

    Example:
        >>> from routed_peft.data import train_tokenizer
        >>> ds = Dataset.from_dict({"text": ["a b", "x y", "c d"], "route_label": ["retain", "forget", "retain"]})
        >>> rows = pack(ds, train_tokenizer(ds["text"], vocab_size=258), length=4)
        >>> sorted(rows["route_label"]), set(map(len, rows["input_ids"]))
        (['forget', 'retain', 'retain'], {4})
    """
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

    packed, values = [], []
    spread: dict[str, list[np.ndarray]] = {name: [] for name in per_token}
    for key, members in groups.items():
        stream = np.concatenate([tokens[index] for index in members])
        count = len(stream) // length
        packed.append(stream[: count * length].reshape(count, length))
        values += [key] * count
        sizes = [len(tokens[index]) for index in members]
        for name, own in kinds.items():
            spread[name] += list(np.repeat(own[members], sizes)[: count * length].reshape(count, length))
    _check_filled(groups, values, by=by, length=length)
    rows, order = np.concatenate(packed), rng.permutation(len(values))
    features = Features({"input_ids": List(Value("int32"))} | {name: ds.features[name] for name in by})
    features |= {name: List(ds.features[name]) for name in per_token}
    columns = {name: [values[index][i] for index in order] for i, name in enumerate(by)}
    columns |= {name: [found[index] for index in order] for name, found in spread.items()}
    return Dataset.from_dict({"input_ids": list(rows[order])} | columns, features=features)


def tokenize(ds: Dataset, tokenizer: PreTrainedTokenizerBase, column: str) -> list[np.ndarray]:
    """Return the tokens of each document, including the end-of-sequence token."""
    eos = tokenizer.eos_token_id
    return [
        np.array([*ids, eos], dtype=np.int32)
        for batch in ds.iter(batch_size=1000)
        for ids in tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    ]


def _check(ds: Dataset, tokenizer: PreTrainedTokenizerBase, *, length: int, by: Sequence[str], column: str) -> None:
    if length < 1 or tokenizer.eos_token_id is None:
        raise ValueError(
            "packing needs a `length` of at least 1 and a `tokenizer` with an end-of-sequence token, got "
            f"{length} and {tokenizer.eos_token!r}"
        )
    if missing := [name for name in (column, *by) if name not in ds.column_names]:
        raise ValueError(f"the dataset lacks the columns {missing}, got {ds.column_names}: see `column` and `by`")
    if labeled := [name for name in (ROUTE_LABELS, ROUTE_WEIGHTS) if name in ds.column_names]:
        raise ValueError(f"packing cannot carry {labeled}, one value per token: pack first, then label the packed rows")
    if not len(ds):
        raise ValueError("the dataset has no rows to pack")
    for name in (column, *by):
        if None in ds.with_format(None)[name][:]:
            raise ValueError(f"the column `{name}` has nulls, and packing needs a value in every row")


def _check_filled(
    groups: dict[tuple[Any, ...], list[int]], values: list[Any], *, by: Sequence[str], length: int
) -> None:
    filled = {key[:1] for key in values}
    if lost := {key[:1] for key in groups} - filled:
        names = [key[0] for key in sorted(lost) if key]
        what = f"with `{by[0]}` in {names}" if names else "of the dataset"
        raise ValueError(
            f"the documents {what} do not fill one row of {length} tokens: take a smaller `length` or more data"
        )
