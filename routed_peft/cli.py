"""The command ``routed-peft``: look at runs, ablate and measure them, and see the whole method in a demonstration."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from typer.core import TyperGroup

from routed_peft.commands import COMMANDS
from routed_peft.commands.options import Device, Dtype, Revision, Source

# What takes seconds to import (torch, transformers, lm-eval) is imported by the commands that need it.


class _Commands(TyperGroup):
    """Prints a user's mistake, or the Hub's refusal, as one line; `--debug` shows where it came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, OSError, ImportError, RuntimeError, SafetensorError) as error:
            if ctx.params.get("debug"):
                raise
            words = " ".join([*getattr(error, "__notes__", []), str(error)]).split()  # such as: no directory
            typer.echo(f"routed-peft: {' '.join(words) or type(error).__name__}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Gradient routing: train data into a removable region, then remove it.

    Train with `accelerate launch recipes/pretrain.py --config recipes/configs/sgtm.yaml`, or with `RoutedTrainer` in Python.
    """
    # peft reads transformers' old name of the property
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


@app.command()
def inspect(
    src: Source,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")] = False,
) -> None:
    """Say what a run, a region or a checkpoint holds, without loading it; exit with 1 where files are missing or altered.

    Examples:

        routed-peft inspect runs/sgtm

        routed-peft inspect ORG/MODEL --revision v1 --json
    """
    from routed_peft.checkpoint import inspect_checkpoint

    about = inspect_checkpoint(src, revision=revision)
    if as_json:
        typer.echo(json.dumps(about, indent=2))
    else:
        _show(about)
    if about["problems"]:
        raise typer.Exit(1)


@app.command()
def ablate(
    src: Source,
    out: Annotated[Path, typer.Argument(help="Directory for the new checkpoint: new or empty.", show_default=False)],
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REGION", help="A region to merge, not remove; may be repeated.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Write a plain transformers checkpoint without the regions of a run, and prove it.

    Nothing of a removed region is in OUT. The checkpoint is loaded again, its logits are compared with those of the run with
    these regions off, and OUT/ablation.json says so, with the SHA-256 of every file.

    Examples:

        routed-peft ablate runs/sgtm sgtm-ablated

        routed-peft ablate runs/two-regions bio-only --keep bio
    """
    from routed_peft.ablation import export
    from routed_peft.training.origin import own_regions

    if own_regions(src) == "all" and not keep:
        typer.echo(f"note: {src} was trained without routing, and its units belong to it: --keep them", err=True)
    place = export(src, out, keep or [], revision=revision)
    record = json.loads((place / "ablation.json").read_text(encoding="utf-8"))
    table = _pairs("Ablated")
    table.add_row("checkpoint", str(place))
    for key in ("regions_removed", "regions_kept", "base_adapters_merged"):
        table.add_row(key.replace("_", " "), ", ".join(record[key]) or "none")
    difference, allowed = record["max_logit_difference"], record["allowed_logit_difference"]
    table.add_row("largest logit difference", f"{difference:.3g} (allowed: {allowed:.3g})")
    Console().print(table)


@app.command()
def evaluate(
    src: Source,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A task or group of lm-eval, or several joined by commas; may be repeated. "
                     "By default routed_loss, routed_mc and routed_cloze."),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[+NAME...]", help="A further set of regions to leave on; may be repeated. Besides, "
                     "all and none are measured, and by default each alone."),
    ] = None,
    forget_file: Annotated[Path | None, typer.Option(help="JSONL with `text`: the forget side, for its loss.")] = None,
    retain_file: Annotated[Path | None, typer.Option(help="JSONL with `text`: the retain side.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="More of what tasks read, such as pair=spanish, "
                                       "forget_mc_file=FILE, retain_mc_file=FILE; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write results and settings as JSON.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task, for a quick look.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto is as saved.")] = Dtype.auto,
    revision: Revision = None,
) -> None:  # fmt: skip
    """Measure a run with lm-eval: with all regions, ablated, and with any set of them. It is loaded once.

    `token_ce` is in nats per token. Plain checkpoints can be measured too.

    Examples:

        routed-peft evaluate runs/sgtm

        routed-peft evaluate runs/sgtm --tasks routed_loss --forget-file forget.jsonl --retain-file retain.jsonl

        routed-peft evaluate runs/two-regions --regions bio --regions bio+cyber --out results.json
    """
    import torch

    from routed_peft.evaluation import evaluate_source, results_table
    from routed_peft.evaluation.harness import DEFAULT_TASKS
    from routed_peft.evaluation.source import held_out_pair
    from routed_peft.tasks.utils import METADATA

    about = _metadata(metadata or [], {"forget_file": forget_file, "retain_file": retain_file})
    chosen = [name for entry in tasks or DEFAULT_TASKS for name in entry.split(",") if name]
    ours = all(name.startswith("routed_") and name != "routed_wmdp" for name in chosen)
    if ours and (unknown := sorted(about.keys() - METADATA)):
        raise ValueError(
            f"`--metadata` has {unknown[0]!r}, which no task reads: the keys are {', '.join(sorted(METADATA))}"
        )
    subsets = {entry: entry.split("+") for entry in regions} if regions else None
    results = evaluate_source(
        src,
        chosen,
        subsets,
        about,
        limit,
        batch_size,
        device or ("cuda" if torch.cuda.is_available() else None),
        out,
        revision=revision,
        dtype=dtype.value,
    )
    sides = [side for side in ("forget", "retain") if f"{side}_file" not in about]
    pair, known = held_out_pair(src, about)
    caption = f"{' and '.join(sides)} losses: held-out text of the pair {pair}" + (
        "" if known else ", which this model may not have been trained on"
    )
    packaged = sides and any("loss" in name for name in chosen)
    Console().print(results_table(results, title=src, caption=caption if packaged else None))
    if out is not None:
        typer.echo(f"written to {out}")


@app.command("tasks-path")
def tasks_path() -> None:
    """Print the directory of our lm-eval tasks.

    Example:

        lm_eval --model hf --model_args pretrained=sgtm-ablated --tasks routed_mc --include_path "$(routed-peft tasks-path)"
    """
    from routed_peft.tasks import path

    typer.echo(path())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes: new or empty.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="3 minutes instead of 12, on two cores.")] = False,
) -> None:
    """Train a small model on real text in four arms, ablate, measure and relearn them, and write a report.

    Examples:

        routed-peft demo

        routed-peft demo --quick --out my-demo
    """
    from routed_peft.demo import run_demo

    run_demo(out, quick)


for command in COMMANDS:
    app.command()(command)


def _metadata(entries: Sequence[str], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` entries, and add the files that were named."""
    if bad := [entry for entry in entries if not entry.split("=")[0] or "=" not in entry]:
        raise ValueError(f"`--metadata` takes KEY=VALUE, got {bad[0]!r}: for example --metadata pair=spanish")
    given = dict(entry.split("=", 1) for entry in entries)
    return given | {key: str(file) for key, file in files.items() if file is not None}


def _pairs(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _show(about: Mapping[str, Any]) -> None:
    """Print what `inspect_checkpoint` found."""
    console = Console()
    overview = _pairs(about["source"])
    overview.add_row("kind", "region" if "type" in about else about["kind"])
    base, ablation = about.get("base") or {}, about.get("ablation") or {}
    rows: dict[str, Any] = {
        "revision": about.get("revision"),
        "base": base.get("id"),
        "trained from": (base.get("trained_from") or {}).get("id"),
        "ablated from": ablation.get("source"),
        "regions removed": ", ".join(ablation.get("regions_removed", [])),
        "tokens per label": ", ".join(f"{k} {v:,}" for k, v in (about.get("tokens_per_route") or {}).items()),
        "versions": ", ".join(f"{name} {number}" for name, number in (about.get("versions") or {}).items()),
    }
    for name, value in rows.items():
        if value:
            overview.add_row(name, str(value))
    console.print(overview)
    adapters = [("base adapter", entry) for entry in about.get("base_adapters", [])]
    adapters = [("region", entry) for entry in about.get("regions", [])] + adapters
    if "type" in about:  # a region's own folder
        adapters = [("region", {"name": Path(about["source"]).name, "present": True, **about})]
    if adapters:
        console.print(_adapters(adapters))
    if about.get("routes"):
        console.print(_routes(about["routes"]))
    for problem in about["problems"]:
        typer.echo(f"problem: {problem}", err=True)


def _adapters(adapters: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = Table(
        "name", "role", "type", "size", "parameters", "labels", "here", title="Adapters", title_justify="left"
    )
    for role, entry in adapters:
        size = entry.get("size") or entry.get("r")
        parameters = f"{entry['parameters']:,}" if "parameters" in entry else "–"
        labels = ", ".join(entry.get("labels", [])) or "–"
        here = "yes" if entry["present"] else "no"
        table.add_row(entry["name"], role, entry.get("type") or "–", str(size or "–"), parameters, labels, here)
    return table


def _routes(routes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("label", "gradient weights", "ablated", title="Routes", title_justify="left")
    for label, route in routes.items():
        weights = ", ".join(f"{name} {weight:g}" for name, weight in route["weights"].items())
        table.add_row(label, weights or "all 1", ", ".join(route["ablated"]) or "–")
    return table


def main() -> None:
    """Run the command line; the entry point of ``routed-peft``."""
    app()


if __name__ == "__main__":
    main()
