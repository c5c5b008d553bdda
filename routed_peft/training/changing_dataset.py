"""Base class of training datasets that change while a run trains on them."""

from __future__ import annotations

import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import TrainerCallback

from routed_peft.files import write_bytes

STATE = "changing_dataset.npz"
"""File of a dataset's state in a checkpoint. It may name every row, so it is never pushed."""


class ChangingDataset(Dataset[dict[str, Any]], ABC):
    """A map-style dataset that changes during training, such as `SelfLabeledRows`.

    A routed Trainer adds the dataset's callback to its own, saves its state beside its own in every checkpoint (`STATE`),
    and restores it when a run resumes.

    >>> class Halved(ChangingDataset):  # takes every second row from the tenth step on
    ...     def __init__(self, rows): self.rows, self.stride = rows, 1
    ...     def __len__(self): return len(self.rows)
    ...     def __getitem__(self, index): return self.rows[index // self.stride * self.stride]
    ...     def callback(self, trainer): return HalveAtStep(self, 10)  # a TrainerCallback that sets `stride`
    ...     def state(self): return {"stride": self.stride}
    ...     def restore(self, state): self.stride = state.get("stride", 1)
    >>> Halved([{"a": 0}, {"a": 1}]).state()
    {'stride': 1}
    """

    @abstractmethod
    def callback(self, trainer: Any) -> TrainerCallback:
        """Return the callback that changes the dataset; called once, when ``trainer`` (with ``trainer.routing``) is built.

        ValueError where the trainer's routes or arguments do not fit.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that has changed since the run began, as JSON types; keys must be the dataset's own."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to the ``state`` of a checkpoint; to the beginning where its keys are missing."""

    @property
    def forward_tokens(self) -> int:
        """Tokens of forward passes made to change the dataset, so far; the run's compute includes them."""
        return 0


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a dataset, as compressed JSON in an npz file."""
    content = io.BytesIO()
    np.savez_compressed(content, state=np.frombuffer(json.dumps(state).encode(), dtype=np.uint8))
    write_bytes(folder / STATE, content.getvalue())


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a dataset from a checkpoint; ValueError if its file is missing or damaged."""
    try:
        with np.load(io.BytesIO((folder / STATE).read_bytes()), allow_pickle=False) as content:
            state: dict[str, Any] = json.loads(content["state"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder / STATE}, with the labels that the run had found, is missing or damaged ({error}): "
                         "resume from another checkpoint") from error  # fmt: skip
    return state
