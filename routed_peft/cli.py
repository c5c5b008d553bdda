"""The command ``routed-peft``: inspect, ablate, measure and attack runs, and a demonstration of the whole method."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from routed_peft.commands import COMMANDS
from routed_peft.commands.options import ListOptions
from routed_peft.mistakes import end_bars, explain

# Modules that take seconds to import (torch, transformers, lm-eval) are imported by the commands that need them.


class _Commands(TyperGroup):
    """Prints a user's mistake, or the Hub's refusal, as one line; `--debug` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug") or hasattr(error, "exit_code"):  # typer shows its own
                raise
            end_bars()
            typer.echo(f"routed-peft: {explain(error)}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Gradient routing: train data into a removable region, then remove it.

    Train with `accelerate launch recipes/pretrain.py --config recipes/configs/self_labels.yaml`, or with `RoutedTrainer`
    in Python.
    """
    for stream in (sys.stdout, sys.stderr):  # names may hold what the terminal's encoding has no characters for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # peft reads transformers' old name of the property
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"), cls=ListOptions)(command)


def main() -> None:
    """Run the command line; the entry point of ``routed-peft``."""
    app()


if __name__ == "__main__":
    main()
