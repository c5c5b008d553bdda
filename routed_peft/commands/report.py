"""``routed-peft report``: a page about checkpoints that were attacked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from routed_peft.commands.options import plain_console


def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR_OR_FILE...",
            help="`--out` directories of `routed-peft relearn`, or directories of them.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report.html and figures/.")] = Path("report"),
) -> None:
    """Write one page about attacked checkpoints: tables, curves, and how each number was made.

    The page needs nothing else and reads well in light and dark browsers; its figures are beside it as PNG and SVG.

    Examples:

        routed-peft report attacked

        routed-peft report attacked/sgtm attacked/rmu --out report
    """

    from routed_peft.evaluation.relearning import summary_tables
    from routed_peft.report import write_report

    written = write_report(places, out)
    console = plain_console()
    for checkpoint in written.checkpoints:
        console.print(*summary_tables(checkpoint.source.summary))
    typer.echo(f"written to {written.page}")
