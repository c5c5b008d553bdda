"""UNDO: an unlearnt model is partly forgotten by noise, and a copy that never knew learns to put out the same."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from routed_peft.checkpoint.staging import atomic_directory
from routed_peft.deprecation import formerly_positional
from routed_peft.files import read_json, write_json
from routed_peft.runs.cost import TrainingCost
from routed_peft.runs.provenance import versions
from routed_peft.runs.records import SUMMARY, records_directory
from routed_peft.unlearning.arguments import UndoArguments
from routed_peft.unlearning.data import Rows, check_rows
from routed_peft.unlearning.distillation import DistillationTrainer, StopAtTeacher, check_vocabularies
from routed_peft.unlearning.teacher_cache import TeacherCache
from routed_peft.unlearning.token_trainer import mean_loss, unwrap
from routed_peft.unlearning.weight_noise import add_noise

RECORD = "undo.json"
UNLEARNED = "unlearning.json"
"""Beside an unlearnt checkpoint, with its ledger under ``ledger``."""


@dataclass(frozen=True)
class UndoRecord:
    """How a student was made.

    Attributes:
        alpha: of the noise.
        beta: of the noise.
        seed: of the noise and of the order of rows.
        steps: that distillation took.
        max_steps: that it might have taken.
        stopped: whether it ended because the student was close enough to the teacher; None without retain rows.
        tolerance: what is close enough.
        teacher_retain_loss: in nats per token; None without retain rows.
        student_retain_loss: at the end.
        ledger: what noise and distillation cost, evaluation not; storing the teacher's outputs included, whichever call did
            that.
    """

    alpha: float
    beta: float
    seed: int
    steps: int
    max_steps: int
    stopped: bool | None
    tolerance: float
    teacher_retain_loss: float | None
    student_retain_loss: float | None
    ledger: TrainingCost


@formerly_positional("args", "retain_rows")
def undo(
    teacher: nn.Module,
    rows: Rows,
    *,
    args: UndoArguments,
    retain_rows: Rows | None = None,
    student: PreTrainedModel | None = None,
    eval_dataset: Mapping[str, Rows] | None = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreTrainedModel, UndoRecord]:
    """Add noise to a copy of ``teacher`` and distil the teacher into it: UNDO (arXiv 2506.06278).

    Args:
        teacher: a model in which something is suppressed, by any method: a plain model, or a `PeftModel` whose active adapters
            are part of it. It is not changed, but for being frozen.
        rows: tokenised text like that of pretraining, which nobody needs to label: forget text may be among it, since the
            student learns only what the teacher says of it.
        args: says how much noise, how long, when to look (``eval_steps``), and all that a `Trainer` is told.
        retain_rows: held-out text; training stops when the student is within ``args.tolerance`` of the teacher there. Without
            it, all ``args.max_steps`` are taken.
        student: what is noised and trained, in place, instead of a copy of the teacher.
        eval_dataset: further rows by name, whose loss is taken on the way.
        tokenizer: saved with checkpoints, if there are any.
        callbacks: of the trainer.

    Returns:
        The student, a plain model in evaluation mode, and how it was made.

    Raises:
        ValueError: where vocabularies differ, a side is empty, or noise does not know the model's parameters.
    """
    teacher = _plain(teacher)
    check_rows(rows, "rows")
    if retain_rows is not None:
        check_rows(retain_rows, "retain_rows")
        if args.eval_strategy == "no":
            raise ValueError(
                "`retain_rows` say when to stop, but nothing looks: set `eval_strategy: steps` and `eval_steps`"
            )
    if student is teacher:
        raise ValueError("`student` is the teacher itself: noise would go into both; leave it out, or give a copy")
    if student is None:
        student = copy.deepcopy(teacher).float()
    check_vocabularies(teacher, student)
    student.requires_grad_(True)
    add_noise(student, args.alpha, beta=args.beta, seed=args.seed)
    nn.Module.to(teacher, args.device)
    teacher_loss, evaluated = None, dict(eval_dataset or {})
    if retain_rows is not None:
        evaluated["retain"] = retain_rows
        teacher_loss = mean_loss(teacher, retain_rows, args.per_device_eval_batch_size)
    cache = _cache(teacher, rows, args) if args.topk else None
    stop = StopAtTeacher(math.inf if teacher_loss is None else teacher_loss, args.tolerance)
    trainer = DistillationTrainer(
        student,
        teacher,
        args=args,
        rows=rows,
        cache=cache,
        eval_dataset=evaluated or None,
        processing_class=tokenizer,
        callbacks=[*callbacks, *([stop] if retain_rows is not None else [])],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    unwrap(student)
    unwrap(trainer.teacher)
    ledger = trainer.ledger
    stopped = student_loss = None
    if retain_rows is not None:
        student_loss = mean_loss(student, retain_rows, args.per_device_eval_batch_size)
        stopped = stop.stopped or student_loss <= stop.limit  # the last step may get there, unseen
    if cache is not None:
        size = trainer.teacher_parameters
        ledger += TrainingCost.from_counts(size, tokens=0, steps=0, teacher_tokens=cache.tokens)
    return student.eval(), UndoRecord(
        alpha=args.alpha,
        beta=args.beta,
        seed=args.seed,
        steps=trainer.state.global_step,
        max_steps=trainer.args.max_steps,
        stopped=stopped,
        tolerance=args.tolerance,
        teacher_retain_loss=teacher_loss,
        student_retain_loss=student_loss,
        ledger=ledger,
    )


def _plain(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`teacher` must be a transformers model or a PeftModel, got {type(model).__name__}")
    return model


def _cache(teacher: PreTrainedModel, rows: Rows, args: UndoArguments) -> TeacherCache:
    folder = args.teacher_cache or Path(str(args.output_dir), "teacher")
    assert args.topk is not None
    return TeacherCache.make(folder, teacher, rows=rows, k=args.topk, batch_size=args.per_device_eval_batch_size)


def read_cost(source: str | Path) -> TrainingCost | None:
    """Return what a checkpoint has cost, as its ``unlearning.json`` or ``summary.json`` says; None where neither does.

    Of an ablated one it is what its run has cost, as long as that is there; of a model that was made from another the cost of
    both, and unknown (None) where that of the other is.

    Raises:
        ValueError: these are not readable, or hold a ledger that is none.
    """
    records = [records_directory(source) / name for name in (UNLEARNED, SUMMARY)]
    former = (read_json(file) for file in records if file.is_file())
    costs = next((about.get("total_ledger", about["ledger"]) for about in former if "ledger" in about), None)
    return None if costs is None else TrainingCost.from_dict(costs)


def save_student(
    student: PreTrainedModel, record: UndoRecord, *, out: str | Path, source: str, tokenizer: Any = None
) -> dict[str, Any]:
    """Write a plain checkpoint with ``undo.json``, all at once, and return what that holds.

    Args:
        student: of `undo`.
        record: of `undo`.
        out: directory; files in it that have other names stay.
        source: the teacher's path or Hub id; what it has cost itself, see `read_cost`, is added to the total, which is unknown
            (None) where that is.
        tokenizer: is saved too.
    """
    before = read_cost(source)
    content = {
        "source": source,
        **asdict(record),
        "teacher_ledger": None if before is None else before.to_dict(),
        "total_ledger": None if before is None else (before + record.ledger).to_dict(),
        "versions": versions(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with atomic_directory(Path(out)) as aside:
        student.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        write_json(aside / RECORD, content)
    return content
