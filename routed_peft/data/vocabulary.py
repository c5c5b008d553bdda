"""Tokens beyond a model's vocabulary, which a tokenizer of another model gives: refused before a model reads them."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from torch import nn


def vocabulary(model: nn.Module) -> int:
    """Return the size of a model's vocabulary."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def check_tokens(rows: Any, name: str, size: int) -> None:
    """Raise ValueError if a token is beyond a vocabulary of ``size`` entries, as in rows of another tokenizer.

    ``rows``, a dataset or a sequence, have ``input_ids``; ``name`` is that of the argument.

    >>> check_tokens([{"input_ids": [1, 300]}], "rows", 300)
    Traceback (most recent call last):
    ...
    ValueError: `rows` has the token 300, but the model's vocabulary ends at 299: take the model's ...
    """
    if isinstance(rows, Dataset):
        tables = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
        largest = max(
            (pc.max(table["input_ids"].combine_chunks().flatten()).as_py() or 0 for table in tables), default=0
        )
    else:
        largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if largest >= size:
        got = f"`{name}` has the token {largest}, but the model's vocabulary ends at {size - 1}"
        raise ValueError(f"{got}: take the model's own tokenizer, or resize its embeddings (`resize_token_embeddings`)")
