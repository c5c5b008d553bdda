"""Completeness of a Trainer's checkpoint: `Trainer` resumes with a fresh optimizer if files are lost."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_resumable(checkpoint: str | Path, *, process_index: int = 0, processes: int = 1, fsdp: bool = False) -> None:
    """Raise ValueError if a checkpoint lacks the state of the optimizer, the schedule, the random numbers or the run.

    ``process_index`` is that of this process, whose random state is needed. Another number of ``processes`` than at the
    beginning logs a warning, since the random states do not fit. With ``fsdp`` the optimizer is sharded, and its files have
    other names. The message names the missing files and, if there is one, the latest complete checkpoint before this one.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return  # refused when its weights are read
    find_missing = partial(_missing, process_index=process_index, processes=processes, fsdp=fsdp)
    missing = find_missing(folder)
    if not missing:
        if not (folder / _random_state(process_index, processes)).is_file():
            logger.warning(f"{folder} was written by {_writers(folder)} processes and is resumed in {processes}: its "
                           "random states do not fit, so the run continues with others")  # fmt: skip
        return
    step, others = checkpoint_step(folder.resolve()), folder.resolve().parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    complete = [other for other in others if checkpoint_step(other) < step and not find_missing(other)]
    advice = (
        "no earlier one beside it is complete: begin anew, or from its weights (`load_routed(…, is_trainable=True)`)"
    )
    if complete:
        advice = f"resume from the complete checkpoint '{max(complete, key=checkpoint_step)}'"
    raise ValueError(f"{str(checkpoint)!r} cannot be resumed from: it lacks a complete {', '.join(missing)} (lost, cut "
                     "short, or never written: checkpoints of `save_only_model=True` and of `save_model` hold weights "
                     f"alone); {advice}")  # fmt: skip


def latest_resumable(run: str | Path, processes: int = 1) -> str | None:
    """Return the newest complete checkpoint of a run, or None; `Trainer` writes in place, so a kill leaves incomplete ones."""
    found = [path for path in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    lost = partial(_missing, processes=processes)
    complete = [
        one for one in found if checkpoint_step(one) >= 0 and not (lost(one, fsdp=False) and lost(one, fsdp=True))
    ]
    return str(max(complete, key=checkpoint_step)) if complete else None


def _missing(folder: Path, *, process_index: int = 0, processes: int, fsdp: bool) -> list[str]:
    """Return the names of the files that a checkpoint lacks."""
    optimizers = ("optimizer.bin", "optimizer_0") if fsdp else ("optimizer.pt",)
    missing = [] if any(_whole(folder / name) for name in optimizers) else [" or ".join(optimizers)]
    missing += [SCHEDULER_NAME] if not _whole(folder / SCHEDULER_NAME) else []
    missing += [TRAINER_STATE_NAME] if not _readable(folder / TRAINER_STATE_NAME) else []
    random = _random_state(process_index, processes)
    return missing if _whole(folder / random) or _writers(folder) else [*missing, random]


def _whole(path: Path) -> bool:
    """Return whether a file of `torch.save`, a zip archive, has its end; a directory counts as whole."""
    return path.is_dir() or zipfile.is_zipfile(path)


def _readable(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _random_state(process_index: int, processes: int) -> str:
    return "rng_state.pth" if processes == 1 else f"rng_state_{process_index}.pth"


def _writers(folder: Path) -> int:
    """Return the number of processes that wrote a checkpoint, or 0 if one of their random states is missing."""
    found = {path.name for path in folder.glob("rng_state*.pth") if _whole(path)}
    return len(found) if found == {_random_state(index, len(found)) for index in range(len(found))} else 0


def checkpoint_step(folder: str | Path) -> int:
    """Return the step of a Trainer's checkpoint, by its name; -1 for any other directory.

    >>> checkpoint_step("run/checkpoint-20"), checkpoint_step("run/final")
    (20, -1)
    """
    number = Path(folder).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1
