"""Columns of labels and weights: reading, naming and checking them before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from routed_peft.routes import IGNORED

ROUTE_LABEL = "route_label"
"""Column of one label per example."""
ROUTE_LABELS = "route_labels"
"""Column of one label per token; a label describes its own token."""
ROUTE_WEIGHTS = "route_weights"
"""Column of real-valued multipliers by group, ``{"base": ...}``: one number, or one per position, already aligned."""
ROUTE_ENVIRONMENT = "route_environment"
"""Column of an example's environment, for monitoring: a name, or an integer."""
ROUTE_QUARANTINE = "route_quarantine"
"""Column of the label for rollouts of a quarantined environment, which replaces other labels; null elsewhere."""
ROUTE_COLUMNS = (ROUTE_LABEL, ROUTE_LABELS, ROUTE_WEIGHTS, ROUTE_ENVIRONMENT)
"""Columns that a batch can have; `ROUTE_QUARANTINE` is read from the rows of rollouts instead."""
ALL_COLUMNS = (*ROUTE_COLUMNS, ROUTE_QUARANTINE)

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def add_column(
    ds: AnyDataset,
    name: str,
    *,
    needs: Sequence[str],
    values: Callable[[Mapping[str, list[Any]]], list[Any]],
    batch_size: int = 1000,
) -> AnyDataset:
    """Add or replace the column ``name``, a function of batches of the columns ``needs``; lazily where they stream.

    ClassLabel integers arrive as their names, and missing values as None. ValueError if a column of ``needs`` is missing.
    """
    if (found := ds.column_names) is not None and (missing := [column for column in needs if column not in found]):
        raise ValueError(f"the dataset lacks the columns {missing}, got {found}")
    features = ds.features or {}  # a streaming dataset may not know its features

    def decoded(columns: Mapping[str, list[Any]]) -> list[Any]:
        return values({column: _decode(columns[column], features.get(column)) for column in needs})

    if isinstance(ds, IterableDataset):
        function = lambda *columns: {name: decoded(dict(zip(needs, columns, strict=True)))}
        return ds.map(function, batched=True, batch_size=batch_size, input_columns=list(needs))
    batches = ds.select_columns(list(needs)).with_format(None).iter(batch_size=batch_size)
    column = [value for batch in batches for value in decoded(batch)]
    return (ds.remove_columns(name) if name in ds.column_names else ds).add_column(name, column)


def column_values(ds: Dataset, name: str) -> list[Any]:
    """Return a whole column, ClassLabel integers as their names."""
    if name not in ds.column_names:
        raise ValueError(f"the dataset lacks the column `{name}`, got {ds.column_names}")
    return _decode(ds.with_format(None)[name][:], ds.features[name])


def _decode(values: list[Any], feature: Any) -> list[Any]:
    if not isinstance(feature, ClassLabel):
        return values
    return [None if value is None or value < 0 else feature.names[value] for value in values]


def route_column(columns: Sequence[str]) -> str:
    """Return which of `ROUTE_LABEL` and `ROUTE_LABELS` is among ``columns``; ValueError if neither is, or both are.

    >>> route_column(["input_ids", "route_label"])
    'route_label'
    """
    found = [name for name in (ROUTE_LABEL, ROUTE_LABELS) if name in columns]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"a row is labeled by `{ROUTE_LABEL}` or token by token by `{ROUTE_LABELS}`, got both: drop "
                         "one")  # fmt: skip
    raise ValueError(f"no column `{ROUTE_LABEL}` (per example) or `{ROUTE_LABELS}` (per token), got {sorted(columns)}. "
                     "`routed_peft.data` has functions that add it; TRL's `packing=True` and "
                     "`remove_unused_columns=True` drop it")  # fmt: skip


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes where a dataset's label column holds ClassLabel integers, else None.

    Parts (``torch.utils.data.Subset``) and concatenations of one list of names have the names of their datasets.

    >>> from datasets import Features
    >>> features = Features({"route_label": ClassLabel(names=["retain", "forget"])})
    >>> class_names(Dataset.from_dict({"route_label": [1]}, features=features))
    ['retain', 'forget']
    """
    if isinstance(dataset, Subset):
        return class_names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        first, *others = (class_names(part) for part in dataset.datasets)
        return first if all(names == first for names in others) else None
    features = getattr(dataset, "features", None)  # None: a stream may not know its features
    if not isinstance(features, Mapping):
        return None
    feature: Any = features.get(ROUTE_LABEL, features.get(ROUTE_LABELS))
    feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def label_name(label: Any, names: Sequence[str] | None = None) -> str:
    """Return a label as a string; an integer is looked up in ``names``, never among the routes.

    ValueError if the label is null, or an integer without a name.
    """
    if isinstance(label, str):
        return label
    if isinstance(label, int | np.integer) and not isinstance(label, bool):
        if names is None:
            raise ValueError(f"the integer label {label} has no name, and routes are found by name, never by number: "
                             "write the names themselves into the column, or give the dataset their names by "
                             '`dataset.cast_column("route_label", ClassLabel(names=[…]))`, or the collator by '
                             "`RoutedCollator(…, class_names=[…])`")  # fmt: skip
        if 0 <= label < len(names):
            return names[int(label)]
        if label != -1:  # -1 is how ClassLabel writes a missing value
            raise ValueError(f"the integer label {label} is outside the {len(names)} classes {list(names)}")
    elif label is not None:
        raise ValueError(f"a label is a string or a ClassLabel integer, got {label!r} of type {type(label).__name__}")
    raise ValueError('a label is null: every row needs one; "unlabeled" is a label too')


def check_has_route(label: str, routes: Mapping[str, Any] | Sequence[str]) -> None:
    """Raise ValueError where no route is called ``label``, naming those there are and the nearest."""
    if label not in routes:
        near = get_close_matches(label, list(routes), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "add a route of this name to `routes`, or relabel the rows"
        raise ValueError(f"the label {label!r} has no route, got routes for {list(routes)}: {hint}")


def route_index(
    label: Any, routes: Mapping[str, Any], *, names: Sequence[str] | None = None, per_token: bool = False
) -> int:
    """Return the index of a label's route, found by name; -100 remains where labels are ``per_token``.

    ValueError if the label is null, an integer without a name, or has no route.
    """
    label = label.item() if isinstance(label, Tensor | np.generic) else label
    if per_token and label == IGNORED:
        return IGNORED
    name = label_name(label, names)
    check_has_route(name, routes)
    return list(routes).index(name)


def check_route_columns(
    dataset: Dataset, routes: Mapping[str, Any], names: Sequence[str] | None = None
) -> Counter[str]:
    """Check before training that every row of a map-style dataset has a label, and every label a route.

    Return how many rows of the column ``route_label``, or tokens of ``route_labels``, carry each label. ``names`` are those of
    integer labels, by default from the dataset's ClassLabel column. ValueError if there is no such column or both, a null, a
    label without a route, or a row whose token labels are not as many as its tokens.

    >>> check_route_columns(Dataset.from_dict({"route_label": ["a", "b", "a"]}), {"a": ..., "b": ...})
    Counter({'a': 2, 'b': 1})
    """
    column, names = route_column(dataset.column_names), class_names(dataset) or names
    ids = ["input_ids"] * (column == ROUTE_LABELS and "input_ids" in dataset.column_names)
    found: Counter[Any] = Counter()
    start = 0
    for table in dataset.select_columns([column, *ids]).with_format("arrow").iter(batch_size=10_000):
        values = table[column].combine_chunks()
        if column == ROUTE_LABELS:
            if not pa.types.is_nested(values.type):
                raise ValueError(f"the column `{ROUTE_LABELS}` has one label per token, got one {values.type} a row: a "
                                 f"label of a whole row belongs in `{ROUTE_LABEL}`")  # fmt: skip
            if values.null_count:
                raise ValueError(f"the column `{ROUTE_LABELS}` has nulls after row {start}: every token needs a label")
            if ids:
                _check_lengths(values, table["input_ids"].combine_chunks(), start)
            values = values.flatten()
        if values.null_count or (names and pc.any(pc.equal(values, -1)).as_py()):  # -1 is how ClassLabel writes a null
            raise ValueError(f"the column `{column}` has nulls in rows {start} to {start + len(table) - 1}: every row "
                             'needs a label; "unlabeled" is a label too')  # fmt: skip
        for item in values.value_counts().to_pylist():
            found[item["values"]] += item["counts"]
        start += len(table)
    if column == ROUTE_LABELS:
        found.pop(IGNORED, None)
    counts: Counter[str] = Counter({label_name(label, names): count for label, count in found.items()})
    for label in counts:
        check_has_route(label, routes)
    return counts


def _check_lengths(labels: pa.ListArray, ids: pa.ListArray, start: int) -> None:
    got, expected = (pc.list_value_length(lists).to_numpy(zero_copy_only=False) for lists in (labels, ids))
    if len(wrong := np.flatnonzero(got != expected)):
        row = wrong[0]
        raise ValueError(f"`{ROUTE_LABELS}` needs one label per token: got {got[row]} labels for {expected[row]} "
            f"tokens in row {start + row}. Truncate both alike (TRL's `max_length` cuts `input_ids` only)")  # fmt: skip


def check_texts(ds: Dataset, column: str, name: str = "the dataset") -> None:
    """Raise ValueError unless a column holds strings, none of them missing or blank."""
    feature = ds.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string", "null"):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f"{name} needs strings in the column `{column}`, got {kind}: write numbers and dates as "
                         "strings")  # fmt: skip
    start = 0
    for table in ds.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        values = table[column].cast(pa.large_string())
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
        if (at := pc.index(blank, True).as_py()) >= 0:
            raise ValueError(f"{name} must hold a non-empty `{column}` in every row, got {values[at].as_py()!r} in row "
                             f"{start + at + 1}")  # fmt: skip
        start += len(table)


def check_strings(texts: Iterable[Any], name: str = "texts") -> None:
    """Raise ValueError unless all texts are strings."""
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{name} must be strings, got {odd[0]!r} of type {type(odd[0]).__name__}")
