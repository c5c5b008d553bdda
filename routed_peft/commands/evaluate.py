"""``routed-peft evaluate``: lm-eval on a run with any set of its regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from routed_peft.commands.options import (
    Device,
    Dtype,
    RegionsRepo,
    Revision,
    Source,
    TextColumn,
    TextTemplate,
    TrustRemoteCode,
    check_device,
    plain_console,
)


def evaluate(
    src: Source,
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
    forget_file: Annotated[str | None, typer.Option(metavar="FILE", help="Forget side of the loss tasks: JSONL, JSON, "
                                                    "Parquet or text.")] = None,
    retain_file: Annotated[str | None, typer.Option(metavar="FILE", help="Retain side, likewise.")] = None,
    text_column: TextColumn = "text",
    text_template: TextTemplate = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata for tasks, such as pair=spanish, "
                                       "forget_mc_file=FILE, retain_mc_file=FILE; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file for results and settings.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task, for a quick look.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="Data type of the weights; auto: as saved.")] = Dtype.auto,
    revision: Revision = None,
    regions_repo: RegionsRepo = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Measure a run with lm-eval: with all regions, with none, and with any set of them. The run is loaded once.

    `token_ce` is a cross-entropy in nats per token. Plain checkpoints can be measured too.

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

    check_device(device)
    about = _metadata(metadata or [], {"forget_file": forget_file, "retain_file": retain_file})
    about |= {"text_column": text_column} if text_column != "text" else {}
    about |= {"text_template": text_template} if text_template else {}
    chosen = [name for entry in tasks or DEFAULT_TASKS for name in entry.split(",") if name]
    ours = all(name.startswith("routed_") and name != "routed_wmdp" for name in chosen)
    if ours and (unknown := sorted(about.keys() - METADATA)):
        keys = ", ".join(sorted(METADATA))
        raise ValueError(f"`--metadata` has {unknown[0]!r}, which no task reads: the keys are {keys}")
    subsets = {entry: entry.split("+") for entry in regions} if regions else None
    load: dict[str, Any] = {"revision": revision, "regions_repo": regions_repo, "dtype": dtype.value}
    load |= {"trust_remote_code": True} if trust_remote_code else {}
    load["device"] = device or ("cuda" if torch.cuda.is_available() else None)
    results = evaluate_source(
        src, chosen, regions=subsets, metadata=about, limit=limit, batch_size=batch_size, output=out, **load
    )
    sides = [side for side in ("forget", "retain") if f"{side}_file" not in about]
    pair, known = held_out_pair(src, about)
    caption = f"{' and '.join(sides)} losses: held-out text of the pair {pair}"
    caption += "" if known else ", which this model may not have been trained on"
    packaged = sides and any("loss" in name for name in chosen)
    plain_console().print(results_table(results, title=src, caption=caption if packaged else None))
    if out is not None:
        typer.echo(f"written to {out}")


def _metadata(entries: Sequence[str], files: Mapping[str, str | None]) -> dict[str, Any]:
    """Return ``KEY=VALUE`` entries as a dictionary, with the files that were named."""
    if bad := [entry for entry in entries if not entry.split("=")[0] or "=" not in entry]:
        raise ValueError(f"`--metadata` takes KEY=VALUE, got {bad[0]!r}: for example --metadata pair=spanish")
    given = dict(entry.split("=", 1) for entry in entries)
    return given | {key: file for key, file in files.items() if file is not None}
