"""The beginning of a recipe's run, or the checkpoint from which it goes on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from routed_peft.runs.records import SUMMARY, RunDirectory
from routed_peft.runs.resuming import latest_resumable

SCHEDULE = ("seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs")
ROWS = "per_device_train_batch_size × gradient_accumulation_steps × processes"


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
