"""Check that the labels in the data route something, so that no run is ordinary training by mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers.utils import logging

from routed_peft.routes import Route, Routes

logger = logging.get_logger(__name__)


def check_labels_occur(
    labels: Mapping[str, int], routes: Routes, *, regions: Iterable[str], steps: int | None = None
) -> None:
    """Raise where the labels that occur (label -> how often) route nothing, or no label trains a region.

    ``steps`` are those in which ``labels`` were counted, of a run that goes on. A region without data is then only logged,
    because its data may come later.

    >>> check_labels_occur({"retain": 4}, {"forget": Route({"base": 0}), "retain": Route(ablated=("forget",))},
    ...                    regions=["forget"])
    Traceback (most recent call last):
    ...
    ValueError: no row trains the region 'forget': only ['retain'] occurs in `train_dataset`
    """
    seen = {label: routes[label] for label, count in labels.items() if count}
    if all(route == Route() for route in seen.values()) and any(route != Route() for route in routes.values()):
        within = "" if steps is None else f" in the first {steps} steps (`check_labels_after`)"
        raise ValueError(f"no row is routed: only {sorted(seen)} occurs{within}, which trains everything. Is the label "
                         "column right? (for a run without routing on purpose, use `presets.control()`)")  # fmt: skip
    for region in regions:
        if any(route.weight(region) for route in seen.values()):
            continue
        if steps is None:
            raise ValueError(f"no row trains the region {region!r}: only {sorted(seen)} occurs in `train_dataset`")
        logger.warning(
            f"no row has trained the region {region!r} in the first {steps} steps: only {sorted(seen)} occurred. If that "
            "stays so, the run ends in an error"
        )
