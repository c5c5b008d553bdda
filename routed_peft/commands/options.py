"""Arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

if TYPE_CHECKING:
    from routed_peft.data.loading import TextFormat

Source = Annotated[str, typer.Argument(metavar="SRC", help="Directory or Hub id.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)]
RegionsRepo = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Directory or Hub id of regions not stored with SRC. Default: the one it names."),
]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda:0. Default: a GPU if there is one.")]
TextColumn = Annotated[str, typer.Option(help="Column of the text, or of chats, in every file.")]
TextTemplate = Annotated[str | None, typer.Option(help='Text made of columns, such as "{question} {answer}".')]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that a model brings along.")]


class ListOptions(TyperCommand):
    """A command whose options `--subsets` and `--topics` take all values up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``--topics A B`` as ``--topics A --topics B``."""
        spread: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in ("--subsets", "--topics") else None
            elif option is not None and spread[-1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)


class Dtype(StrEnum):
    """Data type in which weights are loaded."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def plain_console() -> Console:
    """Return a console that shows names as they are, whatever brackets and colons they hold."""
    return Console(markup=False, emoji=False)


def text_format(column: str, template: str | None, src: str, **where: Any) -> TextFormat:
    """Return the place of text in files, with the tokenizer of ``src``; ``where`` are arguments of `load_tokenizer`."""
    from routed_peft.data.loading import TextFormat
    from routed_peft.evaluation.source import load_tokenizer

    return TextFormat(column, template, partial(load_tokenizer, src, **where))


def check_device(device: str | None) -> None:
    """Raise ValueError where a device is not there."""
    import torch

    try:
        if device is not None and torch.empty(1, device=device).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        got = f"`--device` {device!r} cannot be used ({str(error).splitlines()[0]})"
        raise ValueError(f"{got}: name cpu, or a GPU, such as cuda:0") from None


def pairs_table(title: str) -> Table:
    """Return an empty table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
