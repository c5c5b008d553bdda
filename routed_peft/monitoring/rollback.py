"""Rollback after an incident, and training that continues without the environments to blame."""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from routed_peft.deprecation import formerly_positional
from routed_peft.files import write_json
from routed_peft.monitoring.incidents import INCIDENT, Incident
from routed_peft.monitoring.quarantine import DROP, INCIDENTS, QUARANTINE, check_treatments, read_quarantine

logger = logging.getLogger(__name__)


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
            saved = checkpoints(root)
            trainer.train(resume_from_checkpoint=str(saved[max(saved)]) if saved else None)
            trainer.accelerator.wait_for_everyone()
        if not (root / INCIDENT).is_file():
            return trainer, past_incidents(root)
        incident = Incident.read(root)
        treatment = _decided(root, incident, max_incidents=max_incidents, decide=decide)
        trainer.accelerator.wait_for_everyone()  # all processes have read, before one of them moves files
        if trainer.is_world_process_zero():
            checkpoint, _ = rollback(root, incident, treatment)
            logger.warning("halted at step %d: going on from %s with %s", incident.step, checkpoint, treatment)
        trainer.accelerator.wait_for_everyone()
        del trainer  # with its model, before the next one is built
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _decided(
    root: Path, incident: Incident, *, max_incidents: int, decide: Callable[[Incident], Mapping[str, str]]
) -> dict[str, str]:
    halted, look = f"halted at step {incident.step}", f"look at {root / INCIDENT}"
    if (before := len(past_incidents(root))) >= max_incidents:
        raise RuntimeError(f"{halted}, after {before} incidents (`max_incidents` = {max_incidents}): {look}")
    if treatment := dict(decide(incident)):
        return treatment
    raise RuntimeError(f"{halted}, but no environment is to blame, so the same would happen again: {look}")


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
    left = checkpoints(root)
    return (left[max(left)] if left else None), quarantine


def past_incidents(run_dir: str | os.PathLike[str]) -> list[Incident]:
    """Return the incidents of earlier rollbacks, in order."""
    found = {int(path.parent.name): path for path in Path(run_dir).glob(f"{INCIDENTS}/*/{INCIDENT}")}
    return [Incident.read(found[number]) for number in sorted(found)]


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a run's complete checkpoints by step, in order."""
    found = {
        int(match[1]): path
        for path in run_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    }
    return dict(sorted(found.items()))
