"""Begin the run of a recipe, or find the checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from routed_peft.runs.records import SUMMARY, RunDirectory
from routed_peft.runs.resuming import latest_resumable

SCHEDULE = ("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs")
"""Training arguments that decide the rows and the schedule of a run."""
ROWS = "per_device_train_batch_size × gradient_accumulation_steps × processes"
"""Key of the rows per step, named after the options that decide it."""


def begin(run: RunDirectory, recipe: Any, *, args: TrainingArguments, own: Collection[str]) -> None:
    """Write the ``run.json`` of a recipe, and find the checkpoint if the run resumes: in ``args``, a directory or None.

    A resumed run must have the same settings as at its beginning: of ``args`` the `SCHEDULE`, the rows per step and the
    fields ``own``, and all of ``recipe`` except ``ablate_to``.

    Raises:
        ValueError: the directory holds a run that has finished, began with other settings, or could be resumed but is not;
            or `find_checkpoint` refuses the checkpoint.
    """
    args.resume_from_checkpoint = find_checkpoint(run.path, args.resume_from_checkpoint, args.world_size)
    if args.resume_from_checkpoint is None:
        check_not_begun(run.path, args.world_size)
    if args.process_index:
        return
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    config: dict[str, Any] = {"recipe": asdict(recipe), "training": args.to_dict(), ROWS: rows}
    settings = {name: value for name, value in config["recipe"].items() if name != "ablate_to"}
    same = config | {"recipe": settings, "training": {name: config["training"][name] for name in (*own, *SCHEDULE)}}
    seeds = {"seed": args.seed, **{name: settings[name] for name in ("label_seed",) if name in settings}}
    run.start(config, seeds, resume=args.resume_from_checkpoint is not None, same=same)


def check_not_begun(run: Path, processes: int = 1) -> None:
    """Raise ValueError if the directory holds an interrupted run that can resume, so that it does not restart by accident."""
    if not (run / SUMMARY).exists() and latest_resumable(run, processes) is not None:
        raise ValueError(f"{run} holds checkpoints of a run that has not finished: resume it (`resume_from_checkpoint: "
                         "true`), name another directory, or move them away")  # fmt: skip


def find_checkpoint(run: Path, asked: str | bool | None, processes: int = 1) -> str | None:
    """Return the checkpoint to resume from: ``asked``, or the newest of the run for "true"; None to begin.

    "auto" is the newest of a run that has not finished, if it has one: a command that was killed can be repeated as it is.

    >>> find_checkpoint(Path("run"), None), find_checkpoint(Path("run"), "false")
    (None, None)
    """
    word = str(asked).lower()
    if word in ("none", "false", ""):
        return None
    newest = latest_resumable(run, processes)
    if word == "auto":
        return None if (run / SUMMARY).exists() else newest
    if word == "true":
        if newest is None:
            raise ValueError(f"`resume_from_checkpoint` is {word}, but {run} holds no complete checkpoint: leave it "
                             "out to begin anew, and save during training (`save_strategy`)")  # fmt: skip
        return newest
    if not Path(str(asked)).expanduser().is_dir():
        there = f"the newest there is {newest!r}" if newest else "there is none to resume from"
        raise ValueError(f"`resume_from_checkpoint` {asked!r} is no directory: name a checkpoint of {run}, or `true` "
                         f"for its newest ({there})")  # fmt: skip
    return str(Path(str(asked)).expanduser())
