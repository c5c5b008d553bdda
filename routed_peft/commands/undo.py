"""``routed-peft undo``: make unlearned knowledge hard to relearn, by noise and distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from routed_peft.commands import options

if TYPE_CHECKING:
    from routed_peft.unlearning import UndoArguments


def undo(
    src: options.Source,
    out: Annotated[Path, typer.Argument(help="Directory for the new checkpoint.", show_default=False)],
    text: Annotated[list[str], typer.Option(metavar="FILE", help="Text like that of pretraining: JSONL, JSON, Parquet or "
                                            "plain text; needs no labels; may be repeated.")],
    retain: Annotated[str | None, typer.Option(metavar="FILE", help="Held-out retain text: stop once the student is as good "
                                                "there as the teacher.")] = None,
    text_column: options.TextColumn = "text",
    text_template: options.TextTemplate = None,
    alpha: Annotated[float, typer.Option(help="Share of the way from the weights to an initialization: 0 moves nothing, 1 all "
                                         "the way.")] = 0.6,
    beta: Annotated[float, typer.Option(help="Scale of the noise in that initialization.")] = 0.1,
    tolerance: Annotated[
        float, typer.Option(help="Share by which the student's retain loss may exceed the teacher's at the stop.")] = 0.05,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, at most.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate; a cosine schedule decays it.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step and process.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 256,
    eval_steps: Annotated[
        int, typer.Option(min=1, help="Steps between comparisons with the teacher, and between checkpoints.")] = 50,
    topk: Annotated[int | None, typer.Option(min=1, metavar="N", help="First store the teacher's N largest logits per token in "
                                             "OUT/teacher. Default: run the teacher along.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the order of rows.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights stay in float32.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Unlearn, noise, distill (UNDO): add noise to a copy of a model, and distill the original's outputs into it.

    SRC is any checkpoint in which knowledge is suppressed; of a routed run, the ablated model. OUT is a plain checkpoint, and
    OUT/undo.json records its settings and its cost. A command that was killed continues when it is repeated. Under
    `accelerate launch` or torchrun (`-m routed_peft.cli undo ...`) processes share the work. `recipes/undo.py` takes all
    settings of a Trainer as flags.

    Examples:

        routed-peft undo runs/unlearn_maxent undone --text pretraining.jsonl --retain retain.jsonl

        routed-peft undo runs/sgtm undone --alpha 0.4 --text pretraining.jsonl --retain retain.jsonl
    """
    from routed_peft.unlearning import UndoArguments

    alike: dict[str, Any] = {"alpha": alpha, "beta": beta, "tolerance": tolerance, "learning_rate": learning_rate}
    alike |= {"topk": topk, "seed": seed}
    settings: dict[str, Any] = {"source": src, "revision": revision, "trust_remote_code": trust_remote_code}
    settings |= {"text": list(text), "retain": retain, "text_column": text_column, "text_template": text_template}
    settings |= {"steps": steps, "batch_size": batch_size, "length": length, "eval_steps": eval_steps, **alike}
    look = min(eval_steps, steps)
    args = UndoArguments(
        str(out),
        **alike,
        max_steps=steps,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        weight_decay=0.0,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        eval_strategy="no" if retain is None else "steps",
        eval_steps=look,
        save_strategy="steps",
        save_steps=look,
        save_total_limit=1,
        logging_steps=min(10, steps),
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        bf16=bf16,
        use_cpu=cpu,
    )
    _run(settings, args, out)


def _run(settings: dict[str, Any], args: UndoArguments, out: Path) -> None:
    """Distill, unless that is done already, and write checkpoint and records; ``settings`` are recorded in run.json."""
    import shutil

    from routed_peft.checkpoint.staging import recover
    from routed_peft.data import load_texts, pack
    from routed_peft.data.vocabulary import check_tokens, vocabulary
    from routed_peft.evaluation.source import open_plain
    from routed_peft.evaluation.text_loss import check_length
    from routed_peft.files import read_json
    from routed_peft.losses import DivergedError
    from routed_peft.regions.fingerprint import fingerprint
    from routed_peft.runs.resuming import latest_resumable
    from routed_peft.training import RunDirectory, RunRecorder
    from routed_peft.unlearning import read_cost, save_student, undo
    from routed_peft.unlearning.data import check_held_out
    from routed_peft.unlearning.teacher_cache import ABOUT, hash_rows
    from routed_peft.unlearning.undo import RECORD

    src, run = settings["source"], RunDirectory(out)
    where = {name: settings[name] for name in ("revision", "trust_remote_code")}
    if args.process_index == 0:  # the others may come when it has begun
        run.check_separate(src)
    args.resume_from_checkpoint = latest_resumable(out, args.world_size)
    if args.resume_from_checkpoint is not None:  # a run without a checkpoint has nothing to continue
        run.check_same(settings)
    read_cost(src)  # a wrong record is reported before anything is computed
    form = options.text_format(settings["text_column"], settings["text_template"], src, **where)
    documents = load_texts(settings["text"], argument="--text", form=form)
    retain, length = settings["retain"], settings["length"]
    held_out = None if retain is None else load_texts([retain], argument="--retain", form=form)
    teacher, tokenizer = open_plain(src, **where)
    check_length(teacher, tokenizer, length=length, argument="--length")
    rows = pack(documents, tokenizer, length=length, by=[])
    retain_rows = None if held_out is None else pack(held_out, tokenizer, length=length, by=[])
    check_tokens(rows, "--text", vocabulary(teacher))
    if retain_rows is not None:
        check_tokens(retain_rows, "--retain", vocabulary(teacher))
        check_held_out(rows, retain_rows, name="--text", held_out_name="--retain")
    settings |= {"teacher": fingerprint(teacher), "rows": hash_rows(rows), "processes": args.world_size}
    recover(out)
    written = (out / RECORD).is_file()  # and the records of the run are not: it was killed in between
    resume = written or args.resume_from_checkpoint is not None
    if args.process_index == 0:
        run.start(settings, {"seed": args.seed}, resume=resume, same=settings)
    if written:
        content = read_json(out / RECORD)
    else:
        more: dict[str, Any] = {"retain_rows": retain_rows, "tokenizer": tokenizer}
        more["callbacks"] = [RunRecorder(run, method="undo", alpha=args.alpha, beta=args.beta)]
        try:
            student, record = undo(teacher, rows, args=args, **more)
        except DivergedError:
            if args.process_index == 0:
                _remove_checkpoints(out)  # none leads to anything else
            raise
        if args.process_index == 0:
            content = save_student(student, record, out=out, source=src, tokenizer=tokenizer)
    if args.process_index == 0:
        cache = out / "teacher"
        if args.topk is not None and (cache / ABOUT).is_file() and Path(src).resolve() != cache.resolve():
            shutil.rmtree(cache)
        _remove_checkpoints(out)
        run.finish(content)
        options.plain_console().print(_table(content, out))


def _remove_checkpoints(out: Path) -> None:
    import shutil

    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)


def _table(content: dict[str, Any], out: Path) -> Table:
    table = options.pairs_table("UNDO")
    ended = {True: "as good as the teacher", False: "no steps left", None: "all steps, no rule to stop"}
    table.add_row("checkpoint", str(out))
    table.add_row("steps", f"{content['steps']} of {content['max_steps']}: {ended[content['stopped']]}")
    if content["teacher_retain_loss"] is not None:
        losses = f"{content['student_retain_loss']:.3f} (teacher {content['teacher_retain_loss']:.3f}) nats per token"
        table.add_row("retain loss", losses)
    ledger = content["total_ledger"] or content["ledger"]
    rest = f"{ledger['labeled_forget_tokens']:,} tokens labeled forget by somebody"
    rest = "without the teacher's own cost, which is not recorded" if content["total_ledger"] is None else rest
    table.add_row("cost", f"{ledger['flops']:.3g} FLOPs, {ledger['tokens']:,} tokens, {rest}")
    return table
