"""Commands of ``routed-peft``, one file each. A function listed here becomes the command of its name.

Each is a plain function with `typer` annotations and a docstring with an example. Modules that take seconds to import
(torch, transformers, peft, lm-eval) are imported inside it, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

from routed_peft.commands.ablate import ablate
from routed_peft.commands.demo import demo
from routed_peft.commands.evaluate import evaluate
from routed_peft.commands.export import export
from routed_peft.commands.inspect import inspect
from routed_peft.commands.relearn import relearn
from routed_peft.commands.report import report
from routed_peft.commands.tasks_path import tasks_path
from routed_peft.commands.undo import undo

COMMANDS: tuple[Callable[..., None], ...] = (demo, inspect, ablate, export, evaluate, relearn, undo, report, tasks_path)
