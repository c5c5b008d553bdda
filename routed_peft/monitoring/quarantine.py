"""The way back from an incident: to the last checkpoint before it began, with its environments treated."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from routed_peft.data.columns import ROUTE_ENVIRONMENT, ROUTE_LABEL, ROUTE_LABELS, ROUTE_QUARANTINE, column_values
from routed_peft.files import read_json

INCIDENTS, QUARANTINE = "incidents", "quarantine.json"

DROP, FIX, ROUTE = "drop", "fix", "route"
TREATMENTS = (DROP, FIX, ROUTE)
"""What can be done with an environment: leave its rows out, mend them, or give them a label that routes them."""


def read_quarantine(run_dir: str | os.PathLike[str]) -> dict[str, str]:
    """Return what is done with which environment of a run; nothing where there was no incident."""
    path = Path(run_dir) / QUARANTINE
    return read_json(path) if path.is_file() else {}


def check_treatments(treatment: Mapping[str, str]) -> None:
    """Raise ValueError on anything but "drop", "fix" and "route"."""
    if unknown := sorted(set(treatment.values()) - set(TREATMENTS)):
        raise ValueError(f"unknown treatment {unknown[0]!r} of an environment; there are {TREATMENTS}")


def treated(
    dataset: Dataset,
    quarantine: Mapping[str, str],
    fix: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    label: str | None = None,
    column: str = ROUTE_ENVIRONMENT,
) -> Dataset:
    """Return ``dataset`` with quarantined environments treated.

    To "route" sets the column ``route_label`` where there is one, and ``route_quarantine``, by which `RoutedGRPOTrainer` labels
    rollouts whatever its ``label_fn`` says.

    Args:
        dataset: with the column ``route_environment``.
        quarantine: environment -> "drop": its rows are left out; "fix": they go through ``fix``; "route": they get ``label``.
        fix: row -> row.
        label: a name in `routes`, such as "forget" or "flagged".
        column: where the environment is.

    Raises:
        ValueError: on an unknown treatment, or one without its ``fix`` or ``label``; on an environment that does not occur; on
            "route" where labels are per token (``route_labels``).

    Example:
        >>> rows = Dataset.from_dict({"route_environment": ["a", "b", "c"], "route_label": ["retain"] * 3})
        >>> treated(rows, {"a": "drop", "c": "route"}, label="forget")["route_label"][:]
        ['retain', 'forget']
    """
    check_treatments(quarantine)
    for treatment, needed, name in ((FIX, fix, "fix"), (ROUTE, label, "label")):
        if needed is None and treatment in quarantine.values():
            raise ValueError(f"`quarantine` has an environment to {treatment}, and `{name}` is not given")
    names = [str(name) for name in column_values(dataset, column)]
    if unknown := sorted(set(quarantine) - set(names)):
        raise ValueError(f"`quarantine` has {unknown}, which `{column}` does not hold: it holds {sorted(set(names))}")
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
        dataset = dataset.add_column(
            ROUTE_QUARANTINE, [label if quarantine.get(name) == ROUTE else None for name in left]
        )

    def treat(row: dict[str, Any], index: int) -> dict[str, Any]:
        treatment = quarantine.get(left[index])
        if treatment == FIX:
            assert fix is not None
            return fix(row)
        return dict.fromkeys(columns, label) if treatment == ROUTE else {}

    return dataset.map(treat, with_indices=True)
