"""``routed-peft tasks-path``: the directory of this package's lm-eval tasks."""

from __future__ import annotations

import typer


def tasks_path() -> None:
    """Print the directory of this package's lm-eval tasks.

    Example:

        lm_eval --model hf --model_args pretrained=sgtm-ablated --tasks routed_mc --include_path "$(routed-peft tasks-path)"
    """
    from routed_peft.tasks import path

    typer.echo(path())
