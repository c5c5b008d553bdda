"""``routed-peft ablate``: a plain checkpoint without the regions of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from routed_peft.commands.options import RegionsRepo, Revision, Source, TrustRemoteCode, pairs_table, plain_console


def ablate(
    src: Source,
    out: Annotated[Path, typer.Argument(help="Directory for the new checkpoint: new or empty.", show_default=False)],
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REGION", help="A region to merge, not remove; may be repeated.")
    ] = None,
    revision: Revision = None,
    regions_repo: RegionsRepo = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a plain transformers checkpoint without the regions of a run, and verify it.

    OUT holds nothing of a removed region. The new checkpoint is loaded again, and its logits are compared with those of the
    run with these regions switched off. OUT/ablation.json records the result, and the SHA-256 of every file.

    Examples:

        routed-peft ablate runs/sgtm sgtm-ablated

        routed-peft ablate runs/two-regions bio-only --keep bio
    """
    from routed_peft.checkpoint.export import export
    from routed_peft.checkpoint.open_run import OpenRun

    own = OpenRun.from_source(src, revision).layout.kept_regions
    if own and not keep:
        typer.echo(f"note: {', '.join(own)} belongs to {src}, which was trained without routing: --keep it", err=True)
    hub: dict[str, Any] = {"revision": revision, "regions_repo": regions_repo}
    place = export(src, out, keep=keep or [], **hub, trust_remote_code=trust_remote_code)
    record = json.loads((place / "ablation.json").read_text(encoding="utf-8"))
    table = pairs_table("Ablated")
    table.add_row("checkpoint", str(place))
    for key in ("regions_removed", "regions_kept", "base_adapters_merged"):
        table.add_row(key.replace("_", " "), ", ".join(record[key]) or "none")
    difference, allowed = record["max_logit_difference"], record["allowed_logit_difference"]
    table.add_row("largest logit difference", f"{difference:.3g} (allowed: {allowed:.3g})")
    plain_console().print(table)
