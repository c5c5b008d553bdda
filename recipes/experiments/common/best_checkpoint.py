"""Best checkpoints of a training run, with the region and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

DEPLOYED = (0.0, 1.0)
"""Scales at which checkpoints are chosen: with the region ablated, and with it."""


@dataclass
class Best(TrainerCallback):
    """Keeps, for every scale of `DEPLOYED`, the trained weights of the step with the highest score; the start is none.

    Attributes:
        model: its trained parameters are kept.
        score: of the model now, given the step and the region's scale; higher is better, and the first of equals is kept.
        every: steps between looks.
        last: step at which there is a look in any case.
        found: scale -> score, step and weights.
    """

    model: nn.Module
    score: Callable[[int, float], float]
    every: int
    last: int
    found: dict[float, tuple[float, int, dict[str, Tensor]]] = field(default_factory=dict)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look when it is time."""
        step = state.global_step
        if step % self.every and step != self.last:
            return
        for scale in DEPLOYED:
            score = self.score(step, scale)
            if scale not in self.found or score > self.found[scale][0]:
                weights = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
                self.found[scale] = score, step, weights

    def restored(self) -> Iterator[tuple[float, int]]:
        """Put the weights back into the model, those of one scale after the other, and yield scale and step of each."""
        for scale, (_, step, weights) in sorted(self.found.items()):
            self.model.load_state_dict(weights, strict=False)
            yield scale, step

    def measured(self, measure: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
        """Return, by scale as text, the step and what ``measure`` returns at that scale under the best weights."""
        return {f"{scale:g}": {"step": step, **measure(scale)} for scale, step in self.restored()}
