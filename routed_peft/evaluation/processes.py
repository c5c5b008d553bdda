"""The processes that share a grid of attacks."""

from __future__ import annotations

import datetime

import torch
from accelerate import PartialState

PATIENCE = datetime.timedelta(days=7)


def processes() -> PartialState:
    """Return accelerate's state of the processes; without an accelerator they communicate over gloo.

    Without ``cpu=True``, accelerate would treat the processes of torchrun on a CPU as independent ones.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
