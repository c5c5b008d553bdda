"""Environments of a dataset, and rows of a batch and values by environment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from routed_peft.data.columns import ROUTE_ENVIRONMENT, column_values


def list_environments(dataset: Any, column: str = ROUTE_ENVIRONMENT) -> list[str]:
    """Return the environments in a map-style dataset, in the order of its integers if it has such.

    >>> list_environments(Dataset.from_dict({"route_environment": ["b", "a", "b"]}))
    ['a', 'b']
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`environments` of a {type(dataset).__name__} cannot be read from it: list their names")
    if column not in dataset.column_names:
        raise ValueError(f"the dataset has no column `{column}`, got {dataset.column_names}: add it (the name of each "
                         "row's environment), or list the `environments` if they come with the batches")  # fmt: skip
    feature, values = dataset.features[column], column_values(dataset, column)
    if None in values:
        raise ValueError(f"the column `{column}` is null in row {values.index(None)}: every row needs an environment")
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if values and all(isinstance(value, int) for value in values):
        return [str(i) for i in range(max(values) + 1)]
    return sorted({str(name) for name in values})


def rows_by_environment(
    given: Any, names: Sequence[str], *, size: int, column: str = ROUTE_ENVIRONMENT
) -> dict[str, Tensor]:
    """Return the indices of the rows of each environment in ``names``, for those with rows.

    ``given`` holds ``size`` names, or integers ``(B,)`` into ``names``; ``column`` is its name in the dataset, for messages.

    >>> rows_by_environment(["b", "a", "b"], ["a", "b"], size=3)
    {'a': tensor([1]), 'b': tensor([0, 2])}
    """
    if given is None and column != ROUTE_ENVIRONMENT:
        raise ValueError("rollouts came without an environment, which the monitor needs: give every prompt a value in the "
                         f"column `{column}` of the dataset (`environment_column` in the arguments names another)")  # fmt: skip
    if given is None:
        raise ValueError(f"a training batch came without `{ROUTE_ENVIRONMENT}`, which the monitor needs: add the "
                         "column to the dataset, and let the collator keep it")  # fmt: skip
    values = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(values) != size:
        raise ValueError(f"`{column}` names {len(values)} rows, and the batch has {size}")
    rows: dict[str, list[int]] = {name: [] for name in names}  # in the order of `names`, in all processes
    for row, value in enumerate(values):
        rows[_name(value, names, column)].append(row)
    return {name: torch.tensor(found) for name, found in rows.items() if found}


def _name(value: Any, names: Sequence[str], column: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(names):
            return names[value]
        raise ValueError(f"`{column}` has the index {value}, and there are {len(names)} environments: {list(names)}")
    if value in names:
        return str(value)
    near = get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "add it to the monitor's `environments`"
    raise ValueError(f"unknown environment {value!r}, got {list(names)}: {hint}")


def by_name(environments: Sequence[str], values: Tensor) -> dict[str, float]:
    """Return values ``(E,)`` by environment, without NaN, which stands for an environment without rows."""
    pairs = zip(environments, values.tolist(), strict=True)
    return {name: value for name, value in pairs if not math.isnan(value)}
