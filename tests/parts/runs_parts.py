"""Directories that look like a Trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch


def make_checkpoint(folder: Path, *names: str) -> Path:
    """Write a checkpoint's schedule, its state and the files ``names``."""
    folder.mkdir(parents=True)
    for name in ("scheduler.pt", "trainer_state.json", *names):
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        else:
            torch.save({}, folder / name)
    return folder
