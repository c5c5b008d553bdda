"""Trainer callback that writes the records of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerState

from routed_peft.runs.records import RunDirectory


class RunRecorder(TrainerCallback):
    """Append the logs of a Trainer to ``metrics.jsonl``: one point per training log and per evaluated split.

    A point has ``names`` (such as ``method="sgtm"``), ``split`` ("train", or the name of the evaluation set), ``ablated``
    (whether regions were off), ``step``, ``tokens`` (if ``include_num_input_tokens_seen`` is on), and the metrics.
    """

    def __init__(self, run: RunDirectory, **names: Any) -> None:
        self.run, self.names = run, names

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Drop the points after the step at which training resumes."""
        if state.is_world_process_zero:
            self.run.keep(lambda point: point.get("step", 0) <= state.global_step or not self._ours(point))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append one point for ``logs``."""
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # the last is a mean over the run
            return
        split, ablated, prefix = _split(logs)
        metrics = {key.removeprefix(prefix): value for key, value in logs.items() if key != "num_input_tokens_seen"}
        tokens = {} if args.include_num_input_tokens_seen == "no" else {"tokens": state.num_input_tokens_seen}
        self.run.log(**self.names, split=split, ablated=ablated, step=state.global_step, **tokens, **metrics)

    def _ours(self, point: Mapping[str, Any]) -> bool:
        return all(point.get(name) == value for name, value in self.names.items())


def _split(logs: Mapping[str, Any]) -> tuple[str, bool, str]:
    """Return the split of logs, whether regions were ablated, and the prefix of the metrics."""
    key = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), None)
    if key is None:
        return "train", False, ""
    name = key.removeprefix("eval_").removesuffix("loss")
    split = name.removeprefix("ablated_").rstrip("_") or "eval"
    return split, name.startswith("ablated_"), key.removesuffix("loss")
