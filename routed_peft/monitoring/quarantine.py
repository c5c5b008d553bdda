"""Steps after an incident: quarantine of environments, rollback of the run, and training that continues."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from routed_peft.data.columns import ROUTE_ENVIRONMENT, ROUTE_LABEL, ROUTE_LABELS, ROUTE_QUARANTINE, column_values
from routed_peft.deprecation import formerly_positional
from routed_peft.files import read_json, write_json
from routed_peft.monitoring.observation import INCIDENT, Incident

logger = logging.getLogger(__name__)

INCIDENTS, QUARANTINE = "incidents", "quarantine.json"

TREATMENTS = DROP, FIX, ROUTE = "drop", "fix", "route"
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
        raise ValueError(f"`quarantine` has {unknown}, which `{column}` does not hold: name some of "
                         f"{sorted(set(names))}")  # fmt: skip
    if ROUTE in quarantine.values() and ROUTE_LABELS in dataset.column_names:
        raise ValueError("`quarantine` has an environment to route, which gives each of its rows one label; the dataset has "
                         f"labels per token (`{ROUTE_LABELS}`): drop that environment, or let `fix` set them")  # fmt: skip
    treatments = [quarantine.get(name) for name in names]
    dataset = dataset.select([i for i, treatment in enumerate(treatments) if treatment != DROP])
    if not {FIX, ROUTE} & set(quarantine.values()):
        return dataset
    left = [treatment for treatment in treatments if treatment != DROP]
    routed = {ROUTE_LABEL: label} if ROUTE_LABEL in dataset.column_names else {}
    if ROUTE in quarantine.values():
        dataset = dataset.add_column(ROUTE_QUARANTINE, [label if treatment == ROUTE else None for treatment in left])
    treat: dict[Any, Any] = {FIX: fix, ROUTE: lambda row: routed}
    return dataset.map(lambda row, i: treat[left[i]](row) if left[i] else {}, with_indices=True)


def drop_named_environments(incident: Incident) -> dict[str, str]:
    """Drop the environments that an incident names."""
    return dict.fromkeys(incident.named, DROP)


@formerly_positional("max_incidents", "decide")
def run_with_rollback(
    make_trainer: Callable[[dict[str, str]], Trainer],
    run_dir: str | Path,
    *,
    max_incidents: int = 3,
    decide: Callable[[Incident], Mapping[str, str]] = drop_named_environments,
) -> tuple[Any, list[Incident]]:
    """Train until the run finishes; after each halt by a `RegionMonitor`, roll back, treat the data and continue.

    The trainer that finished is returned with the incidents on the way. No data is skipped after an incident
    (``ignore_data_skip``), because the data has changed. An interrupted call can be repeated: it continues from the last
    checkpoint, or from the pending incident.

    Args:
        make_trainer: quarantine (environment -> "drop", "fix" or "route"; empty at first) -> a new trainer with a monitor and
            ``output_dir=run_dir``, and with data from `apply_quarantine`.
        run_dir: the run's directory. Keep its checkpoints: ``save_total_limit`` may delete the one before the onset, and the
            run then starts from the beginning.
        max_incidents: in the whole run.
        decide: incident -> treatment of each environment; by default the named ones are dropped.

    Raises:
        RuntimeError: after more than ``max_incidents``, and if ``decide`` names nothing. ``incident.json`` stays.
        ValueError: if a trainer has another ``output_dir``.
    """
    root = Path(run_dir)
    while True:
        quarantine = read_quarantine(root)
        trainer = make_trainer(dict(quarantine))
        if Path(own := str(trainer.args.output_dir)).resolve() != root.resolve():
            raise ValueError(f"`make_trainer` gave a trainer with `output_dir` {own}, expected {root}")
        if not (root / INCIDENT).is_file():
            trainer.args.ignore_data_skip |= bool(quarantine)
            _, last = max(checkpoints(root).items(), default=(0, None))
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            trainer.accelerator.wait_for_everyone()
        if not (root / INCIDENT).is_file():
            return trainer, past_incidents(root)
        incident = Incident.read(root)
        halted, look = f"halted at step {incident.step}", f"look at {root / INCIDENT}"
        if (before := len(past_incidents(root))) >= max_incidents:
            raise RuntimeError(f"{halted}, after {before} incidents (`max_incidents` = {max_incidents}): {look}")
        if not (treatment := dict(decide(incident))):
            raise RuntimeError(f"{halted}, but no environment is to blame, so the same would happen again: {look}")
        trainer.accelerator.wait_for_everyone()  # all processes have read, before one of them moves files
        if trainer.is_world_process_zero():
            checkpoint, _ = rollback(root, incident, treatment)
            logger.warning("halted at step %d: going on from %s with %s", incident.step, checkpoint, treatment)
        trainer.accelerator.wait_for_everyone()
        del trainer  # with its model, before the next one is built
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rollback(
    run_dir: str | os.PathLike[str], incident: Incident | None = None, treatment: Mapping[str, str] | None = None
) -> tuple[Path | None, dict[str, str]]:
    """Take a halted run back to its last checkpoint before the onset of the incident.

    Checkpoints after the onset move to ``run_dir/incidents/N/``, so that nothing resumes from them by accident, and so does
    ``incident.json``. ``quarantine.json`` gets the treatments of environments. An interrupted call can be repeated.

    Args:
        run_dir: ``output_dir`` of the run.
        incident: by default that of ``run_dir``.
        treatment: environment -> "drop", "fix" or "route"; by default the named ones are dropped.

    Returns:
        The checkpoint to resume from (None: from the start), and the quarantine, with that of earlier incidents.

    Raises:
        ValueError: without an incident, and on an unknown treatment.
    """
    root = Path(run_dir)
    incident = Incident.read(root) if incident is None else incident
    treatment = drop_named_environments(incident) if treatment is None else dict(treatment)
    check_treatments(treatment)
    quarantine = {**read_quarantine(root), **treatment}
    write_json(root / QUARANTINE, quarantine)
    attic = root / INCIDENTS / str(len(past_incidents(root)) + 1)
    attic.mkdir(parents=True, exist_ok=True)
    for step, path in checkpoints(root).items():
        if step > incident.onset_step:
            os.replace(path, attic / path.name)
    if (root / INCIDENT).exists():
        os.replace(root / INCIDENT, attic / INCIDENT)
    else:
        incident.write(attic)
    return max(checkpoints(root).items(), default=(0, None))[1], quarantine


def past_incidents(run_dir: str | os.PathLike[str]) -> list[Incident]:
    """Return the incidents of earlier rollbacks, in order."""
    found = {int(path.parent.name): path for path in Path(run_dir).glob(f"{INCIDENTS}/*/{INCIDENT}")}
    return [Incident.read(found[number]) for number in sorted(found)]


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a run's complete checkpoints by step."""
    complete = (path.parent for path in run_dir.glob("checkpoint-*/trainer_state.json"))
    return {int(match[1]): path for path in complete if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))}
