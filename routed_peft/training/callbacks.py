"""What a Trainer's callbacks hear of an evaluation in two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import CallbackHandler, ProgressCallback, TrainerControl


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
