"""Quarantine of environments after an incident: drop, fix or route their rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from routed_peft.data.columns import ROUTE_ENVIRONMENT, ROUTE_LABEL, ROUTE_LABELS, ROUTE_QUARANTINE, column_values
from routed_peft.deprecation import formerly_positional
from routed_peft.files import read_json

INCIDENTS, QUARANTINE = "incidents", "quarantine.json"

DROP, FIX, ROUTE = "drop", "fix", "route"
TREATMENTS = (DROP, FIX, ROUTE)
"""Treatments of an environment: leave its rows out, correct them, or give them a label that routes them."""


def read_quarantine(run_dir: str | os.PathLike[str]) -> dict[str, str]:
    """Return the treatment of each quarantined environment of a run; empty without an incident."""
    path = Path(run_dir) / QUARANTINE
    return read_json(path) if path.is_file() else {}


def check_treatments(treatment: Mapping[str, str]) -> None:
    """Raise ValueError on anything but "drop", "fix" and "route"."""
    if unknown := sorted(set(treatment.values()) - set(TREATMENTS)):
        raise ValueError(f"unknown treatment {unknown[0]!r} of an environment: give one of {', '.join(TREATMENTS)}")


@formerly_positional("fix", "label", "column")
def apply_quarantine(
    dataset: Dataset,
    quarantine: Mapping[str, str],
    *,
    fix: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    label: str | None = None,
    column: str = ROUTE_ENVIRONMENT,
) -> Dataset:
    """Return a dataset in which the rows of quarantined environments are dropped, fixed or routed.

    "route" sets the column ``route_label`` if there is one, and ``route_quarantine``, which overrides the ``label_fn`` of
    `RoutedGRPOTrainer`.

    Args:
        quarantine: environment -> "drop": its rows are left out; "fix": they go through ``fix``; "route": they get ``label``.
        label: a name in `routes`, such as "forget" or "flagged".

    Raises:
        ValueError: on an unknown treatment, or one without its ``fix`` or ``label``; on an unknown environment; on "route" with
            labels per token (``route_labels``).

    >>> rows = Dataset.from_dict({"route_environment": ["a", "b", "c"], "route_label": ["retain"] * 3})
    >>> apply_quarantine(rows, {"a": "drop", "c": "route"}, label="forget")["route_label"][:]
    ['retain', 'forget']
    """
    check_treatments(quarantine)
    for treatment, needed, name in ((FIX, fix, "fix"), (ROUTE, label, "label")):
        if needed is None and treatment in quarantine.values():
            raise ValueError(f"`quarantine` has an environment to {treatment}: give `{name}` too")
    names = [str(name) for name in column_values(dataset, column)]
    if unknown := sorted(set(quarantine) - set(names)):
        raise ValueError(
            f"`quarantine` has {unknown}, which `{column}` does not hold: name some of {sorted(set(names))}"
        )
    if ROUTE in quarantine.values() and ROUTE_LABELS in dataset.column_names:
        raise ValueError(
            f"`quarantine` has an environment to route, which gives each of its rows one label; the dataset has labels per "
            f"token (`{ROUTE_LABELS}`): drop that environment, or let `fix` set them"
        )
    dataset = dataset.select([i for i, name in enumerate(names) if quarantine.get(name) != DROP])
    if not {FIX, ROUTE} & set(quarantine.values()):
        return dataset
    left = [name for name in names if quarantine.get(name) != DROP]
    columns = [ROUTE_LABEL] * (ROUTE_LABEL in dataset.column_names)
    if ROUTE in quarantine.values():
        labels = [label if quarantine.get(name) == ROUTE else None for name in left]
        dataset = dataset.add_column(ROUTE_QUARANTINE, labels)

    def treat(row: dict[str, Any], index: int) -> dict[str, Any]:
        treatment = quarantine.get(left[index])
        if treatment == FIX:
            assert fix is not None
            return fix(row)
        return dict.fromkeys(columns, label) if treatment == ROUTE else {}

    return dataset.map(treat, with_indices=True)
