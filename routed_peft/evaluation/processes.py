"""Processes that share a grid of attacks: one, or as many as a launcher started."""

from __future__ import annotations

import datetime

import torch
from accelerate import PartialState

PATIENCE = datetime.timedelta(days=7)


def processes() -> PartialState:
    """Return accelerate's view of the processes; without an accelerator they talk over gloo.

    accelerate, unless it is told to use the CPU, takes the processes of torchrun on a CPU for as many single ones.

    >>> processes().num_processes
    1
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
