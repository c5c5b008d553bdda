"""``routed-peft inspect``: the content of a run, a region or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from routed_peft.commands.options import Revision, Source, pairs_table, plain_console


def inspect(
    src: Source,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole description as JSON.")] = False,
) -> None:
    """Describe a run, a region or a checkpoint without loading it. Exit with 1 if files are missing or altered.

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


def _show(about: Mapping[str, Any]) -> None:
    """Print a description returned by `inspect_checkpoint`."""
    console = plain_console()
    overview = pairs_table(about["source"])
    base, ablation = about.get("base") or {}, about.get("ablation") or {}
    rows: dict[str, Any] = {
        "kind": "region" if "type" in about else about["kind"],
        "revision": about.get("revision"),
        "base": base.get("id"),
        "trained from": (base.get("trained_from") or {}).get("id"),
        "ablated from": ablation.get("source"),
        "regions removed": ", ".join(ablation.get("regions_removed") or []),
        "tokens per label": ", ".join(f"{k} {v:,}" for k, v in (about.get("tokens_per_route") or {}).items()),
        "versions": ", ".join(f"{name} {number}" for name, number in (about.get("versions") or {}).items()),
    }
    for name, value in rows.items():
        if value:
            overview.add_row(name, str(value))
    console.print(overview)
    kinds = {"region": about.get("regions", []), "base adapter": about.get("base_adapters", [])}
    if "type" in about:  # a region's own folder
        kinds = {"region": [{"name": Path(about["source"]).name, "present": True, **about}]}
    if adapters := [(kind, entry) for kind, entries in kinds.items() for entry in entries]:
        console.print(_adapters(adapters))
    if about.get("routes"):
        console.print(_routes(about["routes"]))
    for problem in about["problems"]:
        typer.echo(f"problem: {problem}", err=True)


def _adapters(adapters: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    columns = ("name", "role", "type", "parts", "parameters", "labels", "here")
    table = Table(*columns, title="Adapters", title_justify="left")
    for role, entry in adapters:
        parameters = f"{entry['parameters']:,}" if "parameters" in entry else None
        known = (entry.get("type"), _parts(entry), parameters, ", ".join(entry.get("labels", [])))
        here = "yes" if entry["present"] else "no"
        table.add_row(entry["name"], role, *(str(value or "–") for value in known), here)
    return table


def _parts(entry: Mapping[str, Any]) -> str:
    """Return a region's parts with their sizes, such as ``size 64, r 16, embeddings full``."""
    given = {name: entry[name] for name in ("size", "heads", "r", "embeddings", "norms") if entry.get(name)}
    sizes = {name: f"{len(value)} tokens" if isinstance(value, list) else str(value) for name, value in given.items()}
    return ", ".join(name if value == "True" else f"{name} {value}" for name, value in sizes.items())


def _routes(routes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("label", "gradient weights", "ablated", title="Routes", title_justify="left")
    for label, route in routes.items():
        weights = ", ".join(f"{name} {weight:g}" for name, weight in (route.get("weights") or {}).items())
        table.add_row(label, weights or "all 1", ", ".join(route.get("ablated") or ()) or "–")
    return table
