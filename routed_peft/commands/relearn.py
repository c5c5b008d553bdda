"""``routed-peft relearn``: attack a checkpoint by fine-tuning, and measure how fast it relearns the forget side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from routed_peft.commands import options

_Number = TypeVar("_Number", int, float)
_File = partial(typer.Option, metavar="FILE")


def relearn(
    src: options.Source,
    forget_train: Annotated[str, _File(help="Forget text that the attacker trains on: JSONL, JSON, Parquet or text.")],
    forget_test: Annotated[str, _File(help="Held-out forget text, for the score.")],
    retain_test: Annotated[str, _File(help="Held-out retain text, for the score.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for run.json, metrics.jsonl and summary.json.")],
    retain_train: Annotated[str | None, _File(help="Retain text of the attacks `mixed` and `retain`.")] = None,
    unrelated_train: Annotated[str | None, _File(help="Text of the attack `unrelated`.")] = None,
    facts: Annotated[str | None, _File(help="Facts that the model knew, one per row, for the attack `facts`. Rows with the "
                                        "same `fact` stay together.")] = None,
    text_column: options.TextColumn = "text",
    text_template: options.TextTemplate = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Attack: parts joined by +, of full, lora or bias; forget, mixed, retain, unrelated, "
                     "facts or few-shot-N; perturb; int8 or int4. May be repeated. Default: forget."),
    ] = None,
    learning_rate: Annotated[
        str | None, typer.Option(metavar="LR[,LR...]", help="Learning rates to try first, in full and LoRA fine-tuning. "
                                 "Default: a grid for each method."),
    ] = None,
    steps: Annotated[str, typer.Option(metavar="N[,N...]", help="Last step, with measurements on the way at 0, 1, 2, 5, 10, …; "
                                       "or every step to measure, from 0.")] = "500",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    extensions: Annotated[int, typer.Option(min=0, help="Learning rates added beyond either end of the grid, at most, while "
                                            "the best one lies at that end.")] = 2,
    reference: Annotated[str | None, typer.Option(metavar="SRC", help="Model from which nothing was removed: relearning is "
                                                  "complete at its forget loss.")] = None,
    reference_loss: Annotated[
        float | None, typer.Option(help="That loss itself, in nats per token, instead of `--reference`.")] = None,
    oracle: Annotated[Path | None, typer.Option(metavar="DIR", help="`--out` of the same attacks on the perfect filter, for "
                                                "the normalized area under the curves.")] = None,
    regions: Annotated[
        str | None,
        typer.Option(metavar="NAME[+NAME...]", help="Regions of a run that stay; or all, or none. Default: none, so that the "
                     "ablated model is attacked, but those that belong to a model trained without routing."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents per step.")] = 16,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens per training row; a longer document becomes several rows.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents scored on each side, for a quick look.")] = None,
    device: options.Device = None,
    revision: options.Revision = None,
    regions_repo: options.RegionsRepo = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Attack a checkpoint by fine-tuning, and measure how fast it relearns the forget side.

    Runs, exports and plain checkpoints are attacked in the same way: with float32 weights, at every learning rate and seed.
    The worst case over learning rates and earlier steps counts. A command that was killed continues when it is repeated, and
    added attacks or seeds leave finished ones alone. `accelerate launch` or torchrun (`-m routed_peft.cli relearn ...`)
    spreads the grid over processes.

    Examples:

        routed-peft relearn runs/sgtm --forget-train attack.jsonl --forget-test forget.jsonl --retain-test retain.jsonl --out attacked

        routed-peft relearn runs/sgtm-ablated --attack forget --attack lora+few-shot-16 --attack int4 --reference runs/none --forget-train attack.jsonl --forget-test forget.jsonl --retain-test retain.jsonl --out attacked
    """  # noqa: E501

    from routed_peft.evaluation import relearning
    from routed_peft.evaluation.source import parse_regions, processes

    if reference is not None and reference_loss is not None:
        raise ValueError("`--reference` and `--reference-loss` say the same: give one of them")
    options.check_device(device)
    marks = [_number(int, mark, "--steps") for mark in steps.split(",")]
    rates = [_number(float, rate, "--learning-rate") for rate in learning_rate.split(",")] if learning_rate else None
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    form = options.text_format(text_column, text_template, src, **where)
    read = partial(relearning.read_texts, form=form)
    data = relearning.AttackData(
        forget_train=read(forget_train, "forget_train"),
        forget_test=read(forget_test, "forget_test", limit=limit),
        retain_test=read(retain_test, "retain_test", limit=limit),
        retain_train=read(retain_train, "retain_train") if retain_train else (),
        unrelated_train=read(unrelated_train, "unrelated_train") if unrelated_train else (),
        facts=relearning.read_facts(facts, form=form) if facts else (),
    )
    compared: dict[str, Any] = {"reference": reference if reference_loss is None else reference_loss, "oracle": oracle}
    kept = None if regions is None else parse_regions(regions)
    where |= {"regions": kept, "regions_repo": regions_repo, "device": device}
    more = relearning.SourceOptions(extensions=extensions, progress=True, **compared, **where)
    chosen = [relearning.Attack.parse(name, batch_size=batch_size, length=length) for name in attack or ["forget"]]
    grid: dict[str, Any] = {"learning_rates": rates, "seeds": range(seeds)}
    grid["steps"] = relearning.log_spaced(marks[0]) if len(marks) == 1 else marks
    summary = relearning.relearn_source(src, data, out=out, attacks=chosen, **grid, options=more)
    if processes().is_main_process:
        options.plain_console().print(*relearning.summary_tables(summary))
        typer.echo(f"written to {out}")


def _number(kind: type[_Number], text: str, option: str) -> _Number:
    try:
        number = kind(text)
    except ValueError:
        number = kind(-1)
    if not 0 <= number < float("inf"):
        raise ValueError(f"`{option}` takes numbers from 0, joined by commas, got {text!r}")
    return number
