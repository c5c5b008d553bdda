"""How the run of a recipe begins or goes on, and whether a checkpoint has all that this needs.

`Trainer` would go on with a fresh optimizer where files are lost, and with other rows where a setting differs.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from routed_peft.training.records import SUMMARY, RunDirectory

logger = logging.get_logger(__name__)

SCHEDULE = ("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs")
"""Training arguments that lay out a run: with others it would go on with other rows, or another schedule."""

ROWS = "per_device_train_batch_size × gradient_accumulation_steps × processes"
"""Rows per step, by the options that make them."""


def begin(run: RunDirectory, recipe: Any, args: TrainingArguments, own: Collection[str]) -> None:
    """Write the ``run.json`` of a recipe; and find the checkpoint that it goes on from, where it is asked to.

    Args:
        run: where to.
        recipe: the dataclass of what the recipe is told.
        args: the training arguments; ``resume_from_checkpoint`` becomes a directory, or None.
        own: fields of ``args`` that must be as they were where the run goes on, beside `SCHEDULE`, the rows per step and all of
            ``recipe`` but where the ablated model goes.

    Raises:
        ValueError: what `checkpoint_of` raises; the directory holds a run that has finished, was begun otherwise, or can be
            continued and is not.
    """
    args.resume_from_checkpoint = checkpoint_of(run.path, args.resume_from_checkpoint, args.world_size)
    if args.resume_from_checkpoint is None:
        check_not_begun(run.path, args.world_size)
    if args.process_index:
        return
    told, training = asdict(recipe), args.to_dict()
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    kept = {
        "recipe": {name: value for name, value in told.items() if name != "ablate_to"},
        "training": {name: training[name] for name in (*own, *SCHEDULE)},
        ROWS: rows,
    }
    seeds = {"seed": args.seed} | ({"label_seed": told["label_seed"]} if "label_seed" in told else {})
    config = {"recipe": told, "training": training, ROWS: rows}
    run.start(config, seeds, resume=args.resume_from_checkpoint is not None, same=kept)


def check_not_begun(run: Path, processes: int = 1) -> None:
    """Raise ValueError where a run was interrupted and can be continued, so that it is not begun anew by accident.

    >>> check_not_begun(Path("nowhere"))
    """
    if not (run / SUMMARY).exists() and latest_resumable(run, processes) is not None:
        raise ValueError(
            f"{run} holds checkpoints of a run that has not finished: go on with it (`resume_from_checkpoint: true`), name "
            "another directory, or move them away"
        )


def checkpoint_of(run: Path, asked: str | bool | None, processes: int = 1) -> str | None:
    """Return the checkpoint to go on from: ``asked``, or the run's newest where that is "true"; None to begin.

    Raises:
        ValueError: there is none, and which there are.

    Example:
        >>> checkpoint_of(Path("run"), None), checkpoint_of(Path("run"), "false")
        (None, None)
    """
    word = str(asked).lower()
    if word in ("none", "false", ""):
        return None
    newest = latest_resumable(run, processes)
    if word == "true":
        if newest is None:
            raise ValueError(
                f"`resume_from_checkpoint` is {word}, but {run} holds no whole checkpoint: leave it out to begin anew, and "
                "save on the way (`save_strategy`)"
            )
        return newest
    if not Path(str(asked)).expanduser().is_dir():
        there = f"the newest there is {newest!r}" if newest else "there is none to go on from"
        raise ValueError(
            f"`resume_from_checkpoint` {asked!r} is no directory: name a checkpoint of {run}, or `true` for its newest "
            f"({there})"
        )
    return str(Path(str(asked)).expanduser())


def check_resumable(checkpoint: str | Path, process_index: int = 0, processes: int = 1, fsdp: bool = False) -> None:
    """Raise where a checkpoint lacks the state of the optimizer, the schedule, the random numbers or the run.

    Args:
        checkpoint: directory of a Trainer's checkpoint.
        process_index: of this process, whose random state is needed.
        processes: of the run that resumes. A checkpoint of another number of processes resumes with a logged warning, as
            its random states do not fit.
        fsdp: whether the optimizer is sharded, which has other names for it.

    Raises:
        ValueError: names the missing files, and the latest complete checkpoint before this one where there is one.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return  # what it is instead is said where its weights are read
    missing = _missing(folder, process_index, processes, fsdp)
    if not missing:
        if not (folder / _random_state(process_index, processes)).is_file():
            logger.warning(
                f"{folder} was written by {_writers(folder)} processes and is resumed in {processes}: its random states do "
                "not fit, so the run goes on with others"
            )
        return
    complete = [
        other
        for other in folder.resolve().parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if _step(other) < _step(folder.resolve()) and not _missing(other, process_index, processes, fsdp)
    ]
    if complete:
        advice = f"resume from the complete checkpoint '{max(complete, key=_step)}'"
    else:
        advice = "no earlier one beside it is complete: start anew, or from its weights (`load_routed(…, is_trainable=True)`)"
    raise ValueError(
        f"{str(checkpoint)!r} cannot be resumed from, as it has no whole {', '.join(missing)} (lost, cut short, or never "
        f"written: checkpoints of `save_only_model=True` and of `save_model` hold weights alone); {advice}"
    )


def latest_resumable(run: str | Path, processes: int = 1) -> str | None:
    """Return the newest checkpoint of a run from which it can go on; None where there is none.

    One that a kill cut short is passed over: `Trainer` writes in place, the state of the run last.

    Args:
        run: directory of the run.
        processes: of the run that resumes.
    """
    found = [path for path in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]
    whole = [path for path in found if not all(_missing(path, 0, processes, fsdp) for fsdp in (False, True))]
    return str(max(whole, key=_step)) if whole else None


def _missing(folder: Path, process_index: int, processes: int, fsdp: bool) -> list[str]:
    optimizers = ("optimizer.bin", "optimizer_0") if fsdp else ("optimizer.pt",)
    missing = [] if any((folder / name).exists() for name in optimizers) else [" or ".join(optimizers)]
    missing += [SCHEDULER_NAME] if not (folder / SCHEDULER_NAME).is_file() else []
    missing += [TRAINER_STATE_NAME] if not _readable(folder / TRAINER_STATE_NAME) else []
    random = _random_state(process_index, processes)
    return missing if (folder / random).is_file() or _writers(folder) else [*missing, random]


def _readable(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _random_state(process_index: int, processes: int) -> str:
    return "rng_state.pth" if processes == 1 else f"rng_state_{process_index}.pth"


def _writers(folder: Path) -> int:
    """Return how many processes wrote a checkpoint, or 0 where random states of theirs are missing."""
    found = {path.name for path in folder.glob("rng_state*.pth")}
    return len(found) if found == {_random_state(index, len(found)) for index in range(len(found))} else 0


def _step(folder: Path) -> int:
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1
