"""Run a recipe in the process of its test."""

from __future__ import annotations

import runpy
import sys

import pytest
from datasets import enable_progress_bars
from places import ROOT


def run_here(command: list[str]) -> None:
    """Run a recipe in this process, which spares the seconds of starting one; its warnings are errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--debug"])
        patch.setattr(sys, "orig_argv", ["python", *command])
        try:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        finally:
            enable_progress_bars()
