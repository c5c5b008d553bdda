"""Rows of a training run: shuffled passes, pairs of both sides, checks, and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from routed_peft.data.labels import FORGET, RETAIN
from routed_peft.routes import IGNORED

Row = Mapping[str, Any]
Rows = Any
"""A `datasets.Dataset`, or a sequence of rows: mappings with ``input_ids``, and ``labels`` where not every token counts."""

IS_FORGET = "is_forget"


class ShuffledRows(Dataset[Row]):
    """The ``count`` rows of a training run, in order: one shuffled pass over all rows after the other.

    The order depends on the seed alone; keep it (``train_sampling_strategy="sequential"``).

    >>> run = ShuffledRows([{"input_ids": [1]}, {"input_ids": [2, 3]}], count=4)
    >>> len(run), run.tokens(), run.tokens(distinct=True)
    (4, 6, 3)
    """

    def __init__(self, rows: Rows, count: int, seed: int | Sequence[int] = 0) -> None:
        self.rows, self.order = rows, shuffled_passes(len(rows), count, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Row:
        return self.rows[int(self.order[index])]

    def tokens(self, count: int | None = None, distinct: bool = False) -> int:
        """Count the tokens in the first ``count`` rows of the run; with ``distinct``, each row once."""
        chosen = np.unique(self.order[:count]) if distinct else self.order[:count]
        return int(np.array([len(ids) for ids in input_ids(self.rows)])[chosen].sum())


class PairedRows(Dataset[dict[str, Row]]):
    """A run of ``count`` pairs of a forget row and a retain row.

    Every row of a side is used equally often. ``retain`` is None for forget rows alone; a side without rows is a ValueError.

    >>> forget, retain = [{"input_ids": [1]}], [{"input_ids": [2]}, {"input_ids": [3]}]
    >>> pairs = PairedRows(forget, retain, count=2)
    >>> pairs[0]["forget"], sorted(pair["retain"]["input_ids"] for pair in pairs)
    ({'input_ids': [1]}, [[2], [3]])
    """

    def __init__(self, forget: Rows, retain: Rows | None, *, count: int, seed: int = 0) -> None:
        sides = {FORGET: forget} if retain is None else {FORGET: forget, RETAIN: retain}
        for side, rows in sides.items():
            check_rows(rows, f"{side}_rows")
        self.runs = {side: ShuffledRows(rows, count, [seed, i]) for i, (side, rows) in enumerate(sides.items())}

    def __len__(self) -> int:
        return len(self.runs[FORGET])

    def __getitem__(self, index: int) -> dict[str, Row]:
        return {side: run[index] for side, run in self.runs.items()}

    def tokens(self, side: str, count: int | None = None, distinct: bool = False) -> int:
        """Count the tokens of ``side`` in the first ``count`` pairs; with ``distinct``, each row once."""
        return self.runs[side].tokens(count, distinct) if side in self.runs else 0


def shuffled_passes(rows: int, count: int, seed: int | Sequence[int]) -> np.ndarray:
    """Return ``count`` row numbers: one shuffled pass over all ``rows`` after the other.

    >>> sorted(shuffled_passes(3, 6, seed=0).tolist())
    [0, 0, 1, 1, 2, 2]
    """
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(rows) for _ in range(-(-count // rows))] or [np.arange(0)])[:count]


def input_ids(rows: Rows) -> list[list[int]]:
    """Return the token ids of every row."""
    named = getattr(rows, "column_names", None)
    return list(rows["input_ids"][:]) if named else [row["input_ids"] for row in rows]


def check_rows(rows: Rows, name: str) -> None:
    """Raise ValueError unless there are rows, and they are tokenized."""
    if rows is None or not len(rows):
        raise ValueError(f"`{name}` is empty: give tokenized rows (`routed_peft.data.pack` makes them)")
    if "input_ids" not in rows[0]:
        raise ValueError(f"`{name}` has the columns {sorted(rows[0])}, but no `input_ids`: tokenize the text first, for "
                         "example with `routed_peft.data.pack`")  # fmt: skip


def check_held_out(rows: Rows, held_out: Rows, *, name: str, held_out_name: str) -> None:
    """Raise ValueError if held-out rows are also among the training rows."""
    known = {tuple(ids) for ids in input_ids(rows)}
    if both := sum(tuple(ids) in known for ids in input_ids(held_out)):
        raise ValueError(f"{both} of {len(held_out)} rows of `{held_out_name}` {'are' if both > 1 else 'is'} also in "
                         f"`{name}`, which is trained on: give held-out text")  # fmt: skip


def run_on(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """Return the outputs of a causal language model on a batch of `collate`; ``options`` are further arguments."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **options)


def collate(features: Sequence[Row]) -> dict[str, Tensor]:
    """Make one batch of plain rows; or of pairs, forget rows first, with the mask ``is_forget`` ``(B,)``.

    It holds ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)``, padded on the right, where labels are -100.

    >>> batch = collate([{"forget": {"input_ids": [5, 6]}, "retain": {"input_ids": [7, 8, 9]}}])
    >>> batch["labels"], batch["is_forget"]
    (tensor([[   5,    6, -100],
            [   7,    8,    9]]), tensor([ True, False]))
    """
    if FORGET not in features[0]:
        return pad(features)
    sides = {side: [pair[side] for pair in features if side in pair] for side in (FORGET, RETAIN)}
    is_forget = torch.tensor([side == FORGET for side, rows in sides.items() for _ in rows])
    return {**pad([*sides[FORGET], *sides[RETAIN]]), IS_FORGET: is_forget}


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` of rows, each ``(B, T)``; see `collate`."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = [list(row["input_ids"]) for row in rows]
    columns = {"input_ids": (ids, 0), "attention_mask": ([[1] * len(one) for one in ids], 0)}
    columns["labels"] = [list(row.get("labels", row["input_ids"])) for row in rows], IGNORED
    padded = lambda values, fill: torch.tensor([value + [fill] * (length - len(value)) for value in values])
    return {name: padded(*column) for name, column in columns.items()}
