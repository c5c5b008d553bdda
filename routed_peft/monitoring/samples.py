"""`RowSamples`: recent rows of every environment, for incidents."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from routed_peft.monitoring.probe import model_inputs


class RowSamples:
    """The last ``size`` rows of every environment.

    >>> samples = RowSamples(size=1)
    >>> ids = torch.tensor([[1, 2], [3, 4]])
    >>> samples.keep({"input_ids": ids}, {"a": torch.tensor([0, 1])}, step=5)
    >>> samples.decode(tokenizer=None)
    {'a': [{'environment': 'a', 'step': 5, 'input_ids': [1, 2], 'text': None}]}
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: dict[str, deque[dict[str, Any]]] = {}

    def keep(self, inputs: Mapping[str, Any], rows: Mapping[str, Tensor], step: int) -> None:
        """Keep the first rows of each environment in a batch, without padding; ``rows`` are their indices."""
        tokens = model_inputs(inputs)
        mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"])) != 0
        for name, index in rows.items():
            kept = self._rows.setdefault(name, deque(maxlen=self.size))
            for row in index[: self.size].tolist():
                kept.append({"environment": name, "step": step, "input_ids": tokens["input_ids"][row][mask[row]]})

    def decode(self, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
        """Return the rows by environment as plain data, with their ``text`` if the tokenizer can decode."""
        return {name: [_decode(row, tokenizer) for row in rows] for name, rows in self._rows.items()}


def _decode(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    ids = row["input_ids"].tolist()
    return {**row, "input_ids": ids, "text": tokenizer.decode(ids) if hasattr(tokenizer, "decode") else None}
