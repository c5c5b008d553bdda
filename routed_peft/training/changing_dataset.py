"""Base class of training datasets that change while a run trains on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback


class ChangingDataset(Dataset[dict[str, Any]], ABC):
    """A map-style dataset that changes during training, such as `SelfLabeledRows`.

    A routed Trainer adds the dataset's callback to its own, saves its state in every checkpoint (``extra`` in
    ``routing.json``), and restores it when a run resumes.

    Example:
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
        """Return the callback that changes the dataset; called once, when ``trainer`` is built.

        Args:
            trainer: the Trainer, with its `GradientRouting` as ``trainer.routing``.

        Raises:
            ValueError: where the trainer's routes or arguments do not fit the dataset.
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
