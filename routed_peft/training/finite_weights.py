"""Check of a Trainer's weights before they are saved: the loss of the last step was computed before its update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from routed_peft.eval_mode import evaluating
from routed_peft.losses import DivergedError, check_finite_weights

if TYPE_CHECKING:
    Host = Trainer
else:  # TRL's trainers, too, can come after a mix-in
    Host = object


class FiniteWeightsMixin(Host):
    """Mix-in that ends a run in `DivergedError` rather than save weights that have diverged."""

    _last_batch: Mapping[str, Any] | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Do one forward and backward pass as `Trainer` does."""
        self._last_batch = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        return super().training_step(model, inputs, *args, **kwargs)

    def _check_weights(self) -> None:
        """Raise unless the trained weights are finite, and so is what the model says to the last batch."""
        # in every process, without waiting for others: somebody may save in the first process alone
        model: Any = self.model_wrapped if self.is_fsdp_enabled else self.model
        check_finite_weights(
            ((name, p) for name, p in model.named_parameters() if p.requires_grad), self.state.global_step
        )
        batch = self._last_batch
        if not batch or "input_ids" not in batch:
            return
        with evaluating(model), torch.no_grad(), self.compute_loss_context_manager():
            logits = getattr(model(**self._prepare_inputs(dict(batch))), "logits", None)
        if not isinstance(logits, Tensor):
            return
        wrong = logits.isnan().any(-1)
        if "attention_mask" in batch and wrong.shape == batch["attention_mask"].shape:
            wrong &= batch["attention_mask"].to(wrong.device) != 0
        if wrong.any():
            raise DivergedError(f"the model's outputs are not finite after step {self.state.global_step}, so it is not "
                                "saved. Lower the learning rate, add warm-up steps or clip (`max_grad_norm`)")  # fmt: skip

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._inner_training_loop(*args, **kwargs)
        self._check_weights()
        self._last_batch = None
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does, unless the weights have diverged."""
        self._check_weights()
        super().save_model(output_dir, _internal_call)
