"""``routed-peft evaluate``: lm-eval on a run with any set of its regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from routed_peft.commands import options


def evaluate(
    src: options.Source,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Task or group of lm-eval, or several joined by commas; may be repeated. "
                     "Default: routed_loss, routed_mc and routed_cloze."),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[+NAME...]", help="Set of regions to leave on, measured besides all and none; may be "
                     "repeated. Default: each region alone."),
    ] = None,
    subsets: Annotated[
        list[str] | None,
        typer.Option(metavar="all | SET...", help="Measure losses under these subsets of regions, and run no tasks: all "
                     "alone is every subset, else names joined by +, none, all."),
    ] = None,
    topics: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE...", help="Text of every topic, for --subsets.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Heat map of --subsets: a .png or .svg file.")
    ] = None,
    forget_file: Annotated[str | None, typer.Option(metavar="FILE", help="Forget side of the loss tasks: JSONL, JSON, "
                                                    "Parquet or text.")] = None,
    retain_file: Annotated[str | None, typer.Option(metavar="FILE", help="Retain side, likewise.")] = None,
    text_column: options.TextColumn = "text",
    text_template: options.TextTemplate = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata for tasks, such as pair=spanish, "
                                       "forget_mc_file=FILE, retain_mc_file=FILE; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for results and settings.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task, for a quick look.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    device: options.Device = None,
    dtype: Annotated[options.Dtype, typer.Option(help="Data type of the weights; auto: as saved.")] = options.Dtype.auto,
    revision: options.Revision = None,
    regions_repo: options.RegionsRepo = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Measure a run with lm-eval: with all regions, with none, and with any set of them. The run is loaded once.

    `token_ce` is a cross-entropy in nats per token. Plain checkpoints can be measured too.

    Examples:

        routed-peft evaluate runs/sgtm

        routed-peft evaluate runs/sgtm --tasks routed_loss --forget-file forget.jsonl --retain-file retain.jsonl

        routed-peft evaluate runs/two-regions --regions bio --regions bio+cyber --out results.json

        routed-peft evaluate runs/two-regions --subsets all --topics bio=a.jsonl core=c.jsonl --plot losses.png
    """
    if subsets or topics or plot:
        if tasks or regions or forget_file or retain_file or metadata:
            raise ValueError("`--subsets` measures losses and runs no tasks: leave out `--tasks`, `--regions`, "
                             "`--forget-file`, `--retain-file` and `--metadata`")  # fmt: skip
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        form = options.text_format(text_column, text_template, src, **hub)
        at = {**hub, "regions_repo": regions_repo, "dtype": dtype.value}
        texts = _topics(topics or [], form, limit)
        _evaluate_subsets(src, subsets or [], texts=texts, out=out, plot=plot, device=device, load=at)
        return
    import torch

    from routed_peft.evaluation import evaluate_source, results_table
    from routed_peft.evaluation.harness import DEFAULT_TASKS
    from routed_peft.tasks.utils import METADATA

    options.check_device(device)
    named = {"forget_file": forget_file, "retain_file": retain_file, "text_template": text_template or None}
    about = _metadata(metadata or [], named | {"text_column": None if text_column == "text" else text_column})
    chosen = [name for entry in tasks or DEFAULT_TASKS for name in entry.split(",") if name]
    ours = all(name.startswith("routed_") and name != "routed_wmdp" for name in chosen)
    if ours and (unknown := sorted(about.keys() - METADATA)):
        got = f"`--metadata` has {unknown[0]!r}, which no task reads"
        raise ValueError(f"{got}: the keys are {', '.join(sorted(METADATA))}")
    sets = {entry: entry.split("+") for entry in regions} if regions else None
    load: dict[str, Any] = {"revision": revision, "regions_repo": regions_repo, "dtype": dtype.value}
    load |= {"trust_remote_code": trust_remote_code, "batch_size": batch_size, "limit": limit}
    device = device or ("cuda" if torch.cuda.is_available() else None)
    results = evaluate_source(src, chosen, regions=sets, metadata=about, device=device, output=out, **load)
    packaged = any("loss" in name for name in chosen)
    options.plain_console().print(results_table(results, title=src, caption=_caption(src, about) if packaged else None))
    if out is not None:
        typer.echo(f"written to {out}")


def _topics(entries: Sequence[str], form: Any, limit: int | None) -> dict[str, list[str]]:
    """Return the texts of ``NAME=FILE`` entries by name."""
    from routed_peft.data.loading import read_texts

    files = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    if not entries or len(files) < len(entries) or not all(files):
        got = f"`--topics` takes NAME=FILE, each name once, got {' '.join(entries) or 'none'}"
        raise ValueError(f"{got}: write --topics bio=a.jsonl core=c.jsonl")
    return {name: read_texts(file, f"topic {name}", limit=limit, form=form) for name, file in files.items()}


def _evaluate_subsets(
    src: str, subsets: list[str], *, texts: Mapping[str, list[str]], out: Path | None, plot: Path | None,
    device: str | None, load: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measure, print, write and draw the losses on topics under subsets of the regions of a run."""
    import torch

    from routed_peft.checkpoint.open_run import OpenRun
    from routed_peft.checkpoint.subsets import parse_subsets
    from routed_peft.evaluation.source import load_source
    from routed_peft.evaluation.subsets import subset_losses, subsets_table
    from routed_peft.files import check_writable, write_json

    if not subsets:
        raise ValueError("`--topics` and `--plot` belong to `--subsets`: add --subsets all")
    if plot is not None:
        if plot.suffix not in (".png", ".svg"):
            raise ValueError(f"`--plot` {str(plot)!r} is neither a .png nor a .svg file: name one")
        from routed_peft.report.heat_map import draw_subsets
    for file in filter(None, (out, plot)):  # before a long measurement
        if file.is_dir():
            raise ValueError(f"{str(file)!r} is a directory: name a file in it")
        check_writable(file.parent)
    options.check_device(device)
    run = OpenRun.from_source(src, load["revision"], regions_repo=load["regions_repo"])
    chosen = parse_subsets(run.layout.regions, subsets)
    needed = [name for name in run.layout.regions if any(name in names for names in chosen.values())]
    model, tokenizer = load_source(src, needed, **load)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    losses = subset_losses(model.to(device), tokenizer, topics=texts, subsets=list(chosen))
    options.plain_console().print(subsets_table(losses, title=src))
    if out is not None:
        cells = {subset: {topic: one._asdict() for topic, one in row.items()} for subset, row in losses.items()}
        documents = {topic: len(rows) for topic, rows in texts.items()}
        about = {"source": src, "revision": run.commit, "regions": chosen, "documents": documents}
        write_json(out, {**about, "losses": cells})
    if plot is not None:
        draw_subsets(losses, plot)
    for file in filter(None, (out, plot)):
        typer.echo(f"written to {file}")


def _caption(src: str, about: Mapping[str, Any]) -> str | None:
    """Return a sentence on the text of this package that was scored; None where all of it was given."""
    from routed_peft.evaluation.source import held_out_pair

    pair, known = held_out_pair(src, about)
    sides = [side for side in ("forget", "retain") if f"{side}_file" not in about]
    text = f"{' and '.join(sides)} losses: held-out text of the pair {pair}"
    return text + ("" if known else ", which this model may not have been trained on") if sides else None


def _metadata(entries: Sequence[str], named: Mapping[str, str | None]) -> dict[str, Any]:
    """Return ``KEY=VALUE`` entries as a dictionary, with what else was given."""
    if bad := [entry for entry in entries if not entry.split("=")[0] or "=" not in entry]:
        raise ValueError(f"`--metadata` takes KEY=VALUE, got {bad[0]!r}: for example --metadata pair=spanish")
    return dict(entry.split("=", 1) for entry in entries) | {key: v for key, v in named.items() if v is not None}
