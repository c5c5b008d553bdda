"""``routed-peft demo``: the whole method on a small model and real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for all results: new or empty.")] = Path(
        "demo-out"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Take 3 minutes instead of 12, on two cores.")] = False,
) -> None:
    """Train small models on real text in four ways, ablate, measure and relearn them, and write a report.

    Examples:

        routed-peft demo

        routed-peft demo --quick --out my-demo
    """
    from routed_peft.demo import run_demo

    run_demo(out, quick)
