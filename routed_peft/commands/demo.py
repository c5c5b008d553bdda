"""``routed-peft demo``: the whole method on a small model and real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
