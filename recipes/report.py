"""One page of experiments and of attacked checkpoints, with figures.

    python recipes/report.py results/biology.json results/spanish.json --out report
    python recipes/report.py results attacked --out report

Each place is a summary of `recipes/experiment.py` or of `routed-peft relearn`, or a directory of them. The page needs
nothing else and reads well in light and dark browsers; its figures lie beside it as PNG and SVG.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from experiments.report import verdict_tables, write_report
from routed_peft.evaluation.relearning import summary_tables
from routed_peft.runs.command_line import run_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and show its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR_OR_FILE", help="summaries, or directories of them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="directory for report.html and figures/")
    given = parser.parse_args(arguments)
    written = write_report(given.places, given.out)
    console = Console()
    for section in written.sections:
        console.print(*verdict_tables(section))
    for checkpoint in written.checkpoints:
        console.print(*summary_tables(checkpoint.source.summary))
    print(f"written to {written.page}")


if __name__ == "__main__":
    run_recipe(main)
