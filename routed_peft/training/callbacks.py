"""Callbacks of a Trainer: one `on_evaluate` for two passes, and projection of the base after each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from routed_peft.regions.subspace import has_subspace, project_base


@contextmanager
def single_on_evaluate(handler: CallbackHandler) -> Iterator[None]:
    """Skip ``on_evaluate`` of all callbacks but progress bars, so that an evaluation in two passes calls it once.

    A callback such as `EarlyStoppingCallback` expects its metric at every call, and one pass has only half of the metrics.
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

    `RoutedTrainer` and the trainers of `routed_peft.trl` add it by themselves; give it to any other ``Trainer`` as one of its
    ``callbacks``. The component of the base along each subspace is saved with the region, so a resumed or continued run
    projects to exactly the same numbers. ValueError when training begins on a model without a region of ``kind="subspace"``.

    >>> trainer = Trainer(model, args, callbacks=[SubspaceProjection()])  # doctest: +SKIP
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse a model without a subspace region, on which the callback would do nothing."""
        if model is None or not has_subspace(model):
            raise ValueError("`SubspaceProjection` is for models with a region of kind 'subspace', and this one has "
                             'none: add one with `get_peft_model(model, RoutedConfig(kind="subspace", '
                             'subspace="….safetensors"), "persona")`')  # fmt: skip

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Restore the component of the base along each subspace."""
        assert model is not None
        project_base(model)
