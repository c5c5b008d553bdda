"""UNDO (arXiv 2506.06278): add noise to a copy of an unlearned model, and distill the original into it."""

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
from routed_peft.data.vocabulary import check_tokens, vocabulary
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
"""Record beside an unlearned checkpoint, with its cost under ``ledger``."""


@dataclass(frozen=True)
class UndoRecord:
    """Settings and results of `undo`; losses are in nats per token.

    Attributes:
        seed: of the noise and of the order of rows.
        stopped: whether distillation ended because the student was close enough to the teacher; None without retain rows.
        tolerance: largest relative difference in retain loss that is close enough.
        teacher_retain_loss: None without retain rows, like ``student_retain_loss``, which is that at the end.
        ledger: cost of noise, distillation and storing the teacher's outputs, also in earlier calls; without evaluation.
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
    """Add noise to a copy of ``teacher`` and distill the teacher into it: UNDO (arXiv 2506.06278).

    Args:
        teacher: a model in which something is suppressed, by any method: a plain model, or a `PeftModel` with its active
            adapters. It is frozen, and not changed otherwise.
        rows: tokenized text like that of pretraining, without labels; forget text in it does no harm.
        args: amount of noise, length of training, interval of evaluation (``eval_steps``), and the settings of a `Trainer`.
        retain_rows: held-out text; training stops when the student is within ``args.tolerance`` of the teacher there. By
            default all ``args.max_steps`` are taken.
        student: model to noise and train, in place, instead of a copy of the teacher.
        eval_dataset: further rows by name, evaluated on the way.
        tokenizer: saved with checkpoints, if there are any.

    Returns:
        The student, a plain model in evaluation mode, and the record of settings and results.

    Raises:
        ValueError: on different vocabularies, an empty side, or parameters unknown to the model's configuration.
    """
    teacher = _plain(teacher)
    check_rows(rows, "rows")
    check_tokens(rows, "rows", vocabulary(teacher))
    if retain_rows is not None:
        check_rows(retain_rows, "retain_rows")
        if args.eval_strategy == "no":
            raise ValueError("`retain_rows` decide when to stop, but are never evaluated: set `eval_strategy: steps` and "
                             "`eval_steps`")  # fmt: skip
    student = _noised_student(teacher, student, args)
    nn.Module.to(teacher, args.device)
    teacher_loss, evaluated = None, dict(eval_dataset or {})
    if retain_rows is not None:
        evaluated["retain"] = retain_rows
        teacher_loss = mean_loss(teacher, retain_rows, args.per_device_eval_batch_size)
    cache = None
    if args.topk:
        folder, batch = args.teacher_cache or Path(str(args.output_dir), "teacher"), args.per_device_eval_batch_size
        cache = TeacherCache.make(folder, teacher, rows=rows, k=args.topk, batch_size=batch)
    stop = StopAtTeacher(math.inf if teacher_loss is None else teacher_loss, args.tolerance)
    more: dict[str, Any] = {"eval_dataset": evaluated or None, "processing_class": tokenizer}
    more["callbacks"] = [*callbacks, *([stop] if retain_rows is not None else [])]
    trainer = DistillationTrainer(student, teacher, args=args, rows=rows, cache=cache, **more)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    unwrap(student)
    unwrap(trainer.teacher)
    ledger = trainer.ledger
    stopped = student_loss = None
    if retain_rows is not None:
        student_loss = mean_loss(student, retain_rows, args.per_device_eval_batch_size)
        stopped = stop.stopped or student_loss <= stop.limit  # the last step may reach it without an evaluation
    if cache is not None:
        size = trainer.teacher_parameters
        ledger += TrainingCost.from_counts(size, tokens=0, steps=0, teacher_tokens=cache.tokens)
    about: dict[str, Any] = {name: getattr(args, name) for name in ("alpha", "beta", "seed", "tolerance")}
    about |= {"steps": trainer.state.global_step, "max_steps": trainer.args.max_steps, "stopped": stopped}
    about |= {"teacher_retain_loss": teacher_loss, "student_retain_loss": student_loss, "ledger": ledger}
    return student.eval(), UndoRecord(**about)


def _noised_student(teacher: PreTrainedModel, student: PreTrainedModel | None, args: UndoArguments) -> PreTrainedModel:
    """Add noise to ``student``, or to a float32 copy of ``teacher``."""
    if student is teacher:
        raise ValueError("`student` is the teacher itself, so noise would change both: leave it out, or give a copy")
    if student is None:
        student = copy.deepcopy(teacher).float()
    check_vocabularies(teacher, student)
    student.requires_grad_(True)
    add_noise(student, args.alpha, beta=args.beta, seed=args.seed)
    return student


def _plain(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`teacher` must be a transformers model or a PeftModel, got {type(model).__name__}")
    return model


def read_cost(source: str | Path) -> TrainingCost | None:
    """Return the cost of a checkpoint from its ``unlearning.json`` or ``summary.json``; None if neither has it.

    That of an ablated checkpoint is its run's, if that still exists. That of a model made from another includes the other's.
    """
    records = [records_directory(source) / name for name in (UNLEARNED, SUMMARY)]
    former = (read_json(file) for file in records if file.is_file())
    costs = next((about.get("total_ledger", about["ledger"]) for about in former if "ledger" in about), None)
    return None if costs is None else TrainingCost.from_dict(costs)


def save_student(
    student: PreTrainedModel, record: UndoRecord, *, out: str | Path, source: str, tokenizer: Any = None
) -> dict[str, Any]:
    """Write a plain checkpoint with ``undo.json``, atomically, and return the content of ``undo.json``.

    Other files in ``out`` stay. The cost of ``source``, the teacher's path or Hub id, is added to the total: None if unknown.
    """
    before = read_cost(source)
    total = None if before is None else (before + record.ledger).to_dict()
    content = {"source": source, **asdict(record), "teacher_ledger": before and before.to_dict(), "total_ledger": total}
    content |= {"versions": versions(), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    with atomic_directory(Path(out)) as aside:
        student.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        write_json(aside / RECORD, content)
    return content
