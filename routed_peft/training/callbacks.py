"""What a Trainer's callbacks hear of an evaluation in two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from routed_peft.regions.subspace import has_subspace, project_base


@contextmanager
def held_back(handler: CallbackHandler) -> Iterator[None]:
    """Keep ``on_evaluate`` from callbacks, but for progress bars, which end with each pass.

    A callback such as `EarlyStoppingCallback` looks for its metric in every evaluation it hears of; one pass alone has
    only half of the metrics.
    """

    def hold(args: Any, state: Any, control: TrainerControl, metrics: Any, **kwargs: Any) -> TrainerControl:
        for callback in handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(args, state, control, metrics=metrics)
        return control

    handler.on_evaluate = hold  # type: ignore[method-assign]
    try:
        yield
    finally:
        del handler.on_evaluate


class SubspaceProjection(TrainerCallback):
    """Calls `project_base` directly after each step of the optimizer.

    `RoutedTrainer` and the trainers of `routed_peft.trl` add it by themselves; give it to any other ``Trainer``, TRL's
    included, as one of its ``callbacks``. What the base had along each subspace is kept in the region's own files, so a run
    that is resumed, or continued from ``load_routed(..., is_trainable=True)``, is put back to the very same numbers.

    Raises:
        ValueError: when training begins, on a model without a region of ``kind="subspace"``.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[SubspaceProjection()])  # doctest: +SKIP
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse to do nothing without a word."""
        if model is None or not has_subspace(model):
            raise ValueError(
                "`SubspaceProjection` is for models with a region of kind 'subspace', and this one has none: add one with "
                '`get_peft_model(model, RoutedConfig(kind="subspace", subspace="….safetensors"), "persona")`'
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the base back."""
        assert model is not None
        project_base(model)
