"""Evaluation losses of a `Trainer` as means over tokens, in nats."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from routed_peft.routes import IGNORED


class TokenLossMixin:
    """Mix-in that makes a `Trainer`'s evaluation loss the mean over all *tokens* instead of the mean over batches."""

    accelerator: Accelerator
    args: Any
    compute_loss_func: Any
    _loss_sums: Tensor
    _measures = False

    def _get_num_items_in_batch(self, batch_samples: list[Any], *args: Any, **kwargs: Any) -> Any:
        if not self._measures:
            return super()._get_num_items_in_batch(batch_samples, *args, **kwargs)  # type: ignore[misc]
        # otherwise Trainer divides an evaluation's loss by the tokens of all processes, however many each has
        if self.compute_loss_func is None:
            return None
        return sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batch_samples if "labels" in batch)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch, and add up its loss and tokens."""
        if "labels" in inputs:
            inputs = {**inputs, "labels": ignore_repeated_rows(inputs["labels"], self.accelerator)}
        across = self.args.average_tokens_across_devices
        self._measures, self.args.average_tokens_across_devices = True, False  # each process divides by its own tokens
        try:
            result = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._measures, self.args.average_tokens_across_devices = False, across
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum()) if "labels" in inputs else 0
        if result[0] is not None and tokens:
            self._loss_sums += torch.tensor([float(result[0]) * tokens, tokens], dtype=torch.float64)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run the loop; the loss is the mean over tokens."""
        self._loss_sums = torch.zeros(2, dtype=torch.float64)
        output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        sums: Any = self.accelerator.reduce(self._loss_sums.float().to(self.accelerator.device), "sum")
        total, tokens = sums.tolist()
        key, metrics = f"{kwargs.get('metric_key_prefix', 'eval')}_loss", output.metrics
        if tokens and metrics is not None and key in metrics:
            metrics[key] = total / tokens
        return output


def ignore_repeated_rows(labels: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the targets of a batch, ``(B, T)``, ignored in rows that only repeat others.

    The data loader of ``accelerator``, which made the batch, fills last ones from the beginning, so that processes have
    equally many.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return labels
    kept = state.remainder - accelerator.process_index * len(labels)
    return torch.where((torch.arange(len(labels)) < kept).to(labels.device)[:, None], labels, IGNORED)
