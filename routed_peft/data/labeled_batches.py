"""Labels for the batches of any collator: route columns are taken out of the rows first, and added to the batch by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routed_peft.data.collator import Feature, RoutedCollator, common_keys, label_batch, plain
from routed_peft.data.columns import ALL_COLUMNS, ROUTE_LABEL, ROUTE_WEIGHTS, label_name, route_column
from routed_peft.routes import IGNORED

Collator = Callable[[Any], Any]
Place = tuple[int, int, int]
"""A part of a row that stands in a batch: from which position on there, from which on in the row, and its tokens."""


@dataclass
class LabeledBatches:
    """Add labels, as indices of routes, to the batches of a collator that knows nothing of routes.

    The collator gets rows without route columns. One that cannot do without them gets them, integers as their names, and
    what it makes of them is replaced.

    Raises:
        ValueError: as `RoutedCollator` does; also where the batch has other rows than it was made of, or another order, and
            where labels per token cannot be aligned with what the collator padded or cut.

    >>> collate = LabeledBatches(lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    ...                          {"forget": ..., "retain": ...}, class_names=["retain", "forget"])
    >>> collate([{"input_ids": [5, 6], "route_label": 0}, {"input_ids": [7, 8], "route_label": 1}])["route_label"]
    tensor([1, 0])
    """

    collator: Collator  # makes a batch of rows, in their order
    routes: Mapping[str, Any] | None  # label -> route, whose order gives the indices; None, as in evaluation: no labels
    class_names: Sequence[str] | None = None  # names of ClassLabel integers

    def __call__(self, features: Sequence[Feature]) -> Any:
        """Make a batch of the rows ``features``."""
        if not all(isinstance(row, Mapping) for row in features):
            raise ValueError(f"rows are dictionaries with `{ROUTE_LABEL}`, got {type(features[0]).__name__}")
        if self.routes is None:
            return self._collate(features, features)
        keys = common_keys(features, needs=())
        kind = route_column(keys)
        batch = self._collate(features, [{**row, kind: self._named(row[kind])} for row in features])
        size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
        if size != len(features):
            raise ValueError(f"the collator made a batch of {size} rows out of {len(features)}, so their labels do not "
                             "line up: collate row by row, without packing or flattening")  # fmt: skip
        align = partial(_put, places=_find_places(features, batch), batch=batch)
        label_batch(batch, features, keys=keys, routes=self.routes, names=self.class_names, align=align)
        return batch

    def _collate(self, features: Sequence[Feature], named: Sequence[Feature]) -> Any:
        bare = [{name: value for name, value in row.items() if name not in ALL_COLUMNS} for row in features]
        try:
            batch = self.collator(bare)
        except (KeyError, ValueError) as error:
            if not any(set(row) & set(ALL_COLUMNS) for row in named):
                raise
            try:  # it may read them itself
                batch = self.collator(named)
            except Exception:
                raise error from None
        for name in ALL_COLUMNS:
            if name in batch:
                del batch[name]
        return batch

    def _named(self, value: Any) -> Any:
        value = plain(value)
        if isinstance(value, list):
            return [label if label == IGNORED else label_name(label, self.class_names) for label in value]
        return label_name(value, self.class_names)


def labeled_batches(
    collator: Collator, routes: Mapping[str, Any] | None, class_names: Sequence[str] | None = None
) -> Collator:
    """Return a collator that makes the batches of ``collator`` and labels them by ``routes``; None leaves labels out."""
    if isinstance(collator, RoutedCollator):
        return collator.with_routes(routes, class_names)
    return LabeledBatches(collator, routes, class_names)


def _find_places(features: Sequence[Feature], batch: Any) -> list[list[Place]]:
    """Return all places of each row's tokens in its row of the batch; none where the collator changed the tokens.

    ValueError where the batch has the rows in another order.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not all("input_ids" in row for row in features):
        return [[] for _ in features]
    sources, found = [plain(row["input_ids"]) for row in features], ids.tolist()
    mask = batch.get("attention_mask")
    masks = mask.tolist() if isinstance(mask, Tensor) and mask.shape == ids.shape else [None] * len(found)
    places = [_places(*each) for each in zip(sources, found, masks, strict=True)]
    for index, own in enumerate(places):
        if own:
            continue
        if other := [i for i, ids in enumerate(sources) if _places(ids, found[index], masks[index])]:
            raise ValueError(f"the collator changes the order of rows (row {other[0]} of the batch came out as row "
                             f"{index}), so labels do not line up: leave rows in their order")  # fmt: skip
    return places


def _places(ids: list[int], found: list[int], mask: list[int] | None) -> list[Place]:
    """Return where in a row of a batch the tokens ``ids`` stand, padded or cut on either side."""
    attended = [i for i, value in enumerate(mask or []) if value]
    span = attended[-1] - attended[0] + 1 if attended else len(found)
    for count in dict.fromkeys((min(len(ids), len(found)), min(len(ids), span))):  # whole rows first
        fits = [
            (start, source, count)
            for start, source in {(i, j) for i in (0, len(found) - count) for j in (0, len(ids) - count)}
            if found[start : start + count] == ids[source : source + count]
            and (not attended or (start <= attended[0] and attended[-1] < start + count))
        ]
        if fits and count:
            return fits
    return []


def _put(rows: Sequence[list[Any]], name: str, *, places: Sequence[list[Place]], batch: Any) -> Tensor:
    """Return values per token, ``(B, T)``, at the places of their tokens; ValueError without one, or where several disagree."""
    length, fill = batch["input_ids"].shape[1], 1.0 if name == ROUTE_WEIGHTS else IGNORED
    result = []
    for index, (values, found) in enumerate(zip(rows, places, strict=True)):
        own = [(start, values[source : source + count], length - start - count) for start, source, count in found]
        options = [[fill] * before + part + [fill] * after for before, part, after in own]
        if not options or any(option != options[0] for option in options):
            raise ValueError(f"`{name}` has one value per token, and the tokens of row {index} cannot be found in the batch "
                             "that the collator made: pad or cut rows on one side only, or take `RoutedCollator`")  # fmt: skip
        result.append(options[0])
    return torch.tensor(result)
