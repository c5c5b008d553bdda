"""Calls of the command line in this process."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from routed_peft.cli import app


def call(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])
