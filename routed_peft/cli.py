"""The command ``routed-peft``: inspect, ablate, measure and attack runs, and a demonstration of the whole method."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from routed_peft.commands import COMMANDS

# Modules that take seconds to import (torch, transformers, lm-eval) are imported by the commands that need them.

EXTRAS = {"lm_eval": "eval", "pandas": "report", "sklearn": "classifiers", "trl": "trl"}
"""The extra of this package that installs each optional module."""


class _Commands(TyperGroup):
    """Prints a user's mistake, or the Hub's refusal, as one line; `--debug` shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (ValueError, OSError, ImportError, RuntimeError, SafetensorError) as error:
            if ctx.params.get("debug"):
                raise
            words = " ".join([*getattr(error, "__notes__", []), str(error)]).split()  # such as: no directory
            if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").split(".")[0])):
                words.append(f'(pip install "routed_peft[{extra}]")')
            typer.echo(f"routed-peft: {' '.join(words) or type(error).__name__}", err=True)
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

    Train with `accelerate launch recipes/pretrain.py --config recipes/configs/sgtm.yaml`, or with `RoutedTrainer` in Python.
    """
    # peft reads transformers' old name of the property
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"))(command)


def main() -> None:
    """Run the command line; the entry point of ``routed-peft``."""
    app()


if __name__ == "__main__":
    main()
