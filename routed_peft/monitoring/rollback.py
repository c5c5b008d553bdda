"""A run that halts, rolls itself back and goes on without the environments that were to blame."""

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

from routed_peft.files import write_json
from routed_peft.monitoring.incidents import INCIDENT, Incident
from routed_peft.monitoring.quarantine import DROP, INCIDENTS, QUARANTINE, check_treatments, read_quarantine

logger = logging.getLogger(__name__)


def drop_named(incident: Incident) -> dict[str, str]:
    """Drop the environments that an incident names."""
    return dict.fromkeys(incident.named, DROP)


def run_with_rollback(
    make_trainer: Callable[[dict[str, str]], Trainer],
    run_dir: str | Path,
    max_incidents: int = 3,
    decide: Callable[[Incident], Mapping[str, str]] = drop_named,
) -> tuple[Any, list[Incident]]:
    """Train; where a `RegionMonitor` halts the run, roll back, change the data and go on; until it finishes.

    Data is not skipped when resuming after an incident (``ignore_data_skip``), because it is no longer the same. A call that
    was interrupted can be repeated: it goes on from the last checkpoint, or from the incident at hand.

    Args:
        make_trainer: quarantine (environment -> "drop", "fix" or "route"; empty at first) -> a new trainer with a monitor and
            ``output_dir=run_dir``, its data treated accordingly (`treated` does that).
        run_dir: the run's directory. Keep its checkpoints: with ``save_total_limit`` the one before the onset may be gone, and
            the run starts anew.
        max_incidents: over the life of the run.
        decide: what to do with which environment; by default the named ones are dropped.

    Returns:
        The trainer that finished, and the incidents on the way.

    Raises:
        RuntimeError: at one incident too many, and at one for which ``decide`` names nothing. ``incident.json`` stays.
        ValueError: where a trainer has another ``output_dir``.
    """
    root = Path(run_dir)
    while True:
        quarantine = read_quarantine(root)
        trainer = make_trainer(dict(quarantine))
        if Path(str(trainer.args.output_dir)).resolve() != root.resolve():
            raise ValueError(
                f"`make_trainer` gave a trainer with `output_dir` {trainer.args.output_dir}, expected {root}"
            )
        if not (root / INCIDENT).is_file():
            _train(trainer, root, quarantine)
        if not (root / INCIDENT).is_file():
            return trainer, past_incidents(root)
        incident = Incident.read(root)
        treatment = _decided(root, incident, max_incidents, decide)
        trainer.accelerator.wait_for_everyone()  # all processes have read, before one of them moves files
        if trainer.is_world_process_zero():
            checkpoint, _ = rollback(root, incident, treatment)
            logger.warning("halted at step %d: going on from %s with %s", incident.step, checkpoint, treatment)
        trainer.accelerator.wait_for_everyone()
        del trainer  # with its model, before the next one is built
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(trainer: Trainer, root: Path, quarantine: Mapping[str, str]) -> None:
    if quarantine:
        trainer.args.ignore_data_skip = True
    saved = checkpoints(root)
    trainer.train(resume_from_checkpoint=str(saved[max(saved)]) if saved else None)
    trainer.accelerator.wait_for_everyone()


def _decided(
    root: Path, incident: Incident, max_incidents: int, decide: Callable[[Incident], Mapping[str, str]]
) -> dict[str, str]:
    before = len(past_incidents(root))
    if before >= max_incidents:
        raise RuntimeError(
            f"halted at step {incident.step}, after {before} incidents (`max_incidents` = {max_incidents}): look at "
            f"{root / INCIDENT}"
        )
    treatment = dict(decide(incident))
    if not treatment:
        raise RuntimeError(
            f"halted at step {incident.step}, but no environment is to blame, so the same would happen again: look at "
            f"{root / INCIDENT}"
        )
    return treatment


def rollback(
    run_dir: str | os.PathLike[str], incident: Incident | None = None, treatment: Mapping[str, str] | None = None
) -> tuple[Path | None, dict[str, str]]:
    """Take a halted run back to where its trouble began.

    Checkpoints after the onset move to ``run_dir/incidents/N/``, where nothing resumes from them by accident, and so does
    ``incident.json``; ``quarantine.json`` says from then on what is done with which environment. A call that was
    interrupted can be repeated.

    Args:
        run_dir: ``output_dir`` of the run.
        incident: that of ``run_dir`` by default.
        treatment: environment -> "drop", "fix" or "route"; the named ones are dropped by default.

    Returns:
        The checkpoint to resume from (None: from the start), and the whole quarantine, that of earlier incidents included.

    Raises:
        ValueError: where there is no incident, or an unknown treatment.
    """
    root = Path(run_dir)
    incident = Incident.read(root) if incident is None else incident
    treatment = dict.fromkeys(incident.named, DROP) if treatment is None else dict(treatment)
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
    """Return the incidents that a run was rolled back from, in order."""
    found = {int(path.parent.name): path for path in Path(run_dir).glob(f"{INCIDENTS}/*/{INCIDENT}")}
    return [Incident.read(found[number]) for number in sorted(found)]


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return a run's whole checkpoints by step, in order."""
    found = {
        int(match[1]): path
        for path in run_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    }
    return dict(sorted(found.items()))
