"""``routed-peft report``: what experiments and attacks have shown, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR_OR_FILE...",
            help="Summaries of recipes/experiment.py or `routed-peft relearn`, or directories of them.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For report.html and figures/.")] = Path("report"),
) -> None:
    """Draw the curves of experiments, and write one page with tables, how each number was made, and what it leaves open.

    The page needs nothing else and reads well in light and dark browsers; its figures are beside it as PNG and SVG.

    Examples:

        routed-peft report results/biology.json results/spanish.json --out report

        routed-peft report results attacked/sgtm attacked/rmu
    """
    from rich.console import Console

    from experiments.report import verdict_tables, write_report
    from routed_peft.evaluation.relearning import summary_tables

    written = write_report(places, out)
    console = Console()
    for section in written.sections:
        console.print(*verdict_tables(section))
    for checkpoint in written.checkpoints:
        console.print(*summary_tables(checkpoint.source.summary))
    typer.echo(f"written to {written.page}")
