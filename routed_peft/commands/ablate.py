"""``routed-peft ablate``: a plain checkpoint without the regions of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from routed_peft.commands.options import Revision, Source, pairs_table


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
    from routed_peft.checkpoint.export import export
    from routed_peft.runs.records import own_regions

    if own_regions(src) == "all" and not keep:
        typer.echo(f"note: {src} was trained without routing, and its units belong to it: --keep them", err=True)
    place = export(src, out, keep or [], revision=revision)
    record = json.loads((place / "ablation.json").read_text(encoding="utf-8"))
    table = pairs_table("Ablated")
    table.add_row("checkpoint", str(place))
    for key in ("regions_removed", "regions_kept", "base_adapters_merged"):
        table.add_row(key.replace("_", " "), ", ".join(record[key]) or "none")
    difference, allowed = record["max_logit_difference"], record["allowed_logit_difference"]
    table.add_row("largest logit difference", f"{difference:.3g} (allowed: {allowed:.3g})")
    Console().print(table)
