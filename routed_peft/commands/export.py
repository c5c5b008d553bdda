"""``routed-peft export``: one plain checkpoint for each subset of the regions of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from routed_peft.commands.options import RegionsRepo, Revision, Source, TrustRemoteCode, pairs_table, plain_console


def export(
    src: Source,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the checkpoints.", show_default=False)],
    subsets: Annotated[
        list[str] | None,
        typer.Option(metavar="all | SET...", help="Subsets of regions: all alone is every subset (the default), else "
                     "names joined by +, none, all."),
    ] = None,
    revision: Revision = None,
    regions_repo: RegionsRepo = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Write a plain transformers checkpoint for each subset of the regions of a run, and verify it.

    DIR/none is without regions, DIR/bio has bio merged, DIR/bio+cyber both. Checkpoints that are there, unchanged and of
    the same run, are kept. Files of the tokenizer may be hard links: replace them, and do not edit them in place.

    Examples:

        routed-peft export runs/two-regions models --subsets all

        routed-peft export runs/two-regions models --subsets none bio bio+cyber
    """
    from routed_peft.checkpoint.subsets import export_subsets

    where = {"revision": revision, "regions_repo": regions_repo}
    folders = export_subsets(src, out, subsets=subsets, **where, trust_remote_code=trust_remote_code)
    table = pairs_table("Exported, with the largest logit difference from the run")
    for name, folder in folders.items():
        record = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
        table.add_row(name, f"{folder} ({record['max_logit_difference']:.3g})")
    plain_console().print(table)
