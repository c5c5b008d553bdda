"""`TokenTrainer`: base of the package's trainers, with token-weighted losses and checks of model and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from routed_peft.data.vocabulary import check_tokens, vocabulary
from routed_peft.eval_mode import evaluating
from routed_peft.losses import check_finite, token_losses
from routed_peft.routes import IGNORED
from routed_peft.runs.resuming import check_resumable
from routed_peft.training.finite_weights import FiniteWeightsMixin
from routed_peft.training.token_loss import TokenLossMixin
from routed_peft.unlearning.data import Rows, collate, run_on


class TokenTrainer(FiniteWeightsMixin, TokenLossMixin, Trainer):
    """A `Trainer` on tokenized rows with evaluation losses as means over tokens, in nats, over all processes.

    `count_units` counts the units over which a subclass averages its training loss. `compute_loss` divides sums by the counts
    of the whole optimizer step, so results are the same for any split of a step into batches and processes.
    """

    loss_is_scaled_for_ga = True
    training_mark: str
    """A key of training batches that evaluation batches lack."""

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process means DataParallel, which is not supported: start one process "
                             "per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one")  # fmt: skip
        check_trainable(model)
        super().__init__(model, args, **{"data_collator": collate, **kwargs})

    def count_units(self, batch: Mapping[str, Any]) -> Tensor:
        """Count the units of a training batch over which its loss is averaged; of any shape."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def is_training_batch(self, batch: Mapping[str, Any]) -> bool:
        """Whether `compute_loss` computes the training loss of ``batch``, rather than plain cross entropy."""
        return self.training_mark in batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples or not self.is_training_batch(batch_samples[0]):
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = torch.stack([self.count_units(batch) for batch in batch_samples]).sum(0)
        return self.accelerator.reduce(counts.to(device), "sum").clamp(min=1)  # no units mean no loss, not NaN

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Do one forward and backward pass; raise if the loss is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        check_finite(loss, self.state.global_step)
        return loss

    def scaled(self, loss: Tensor) -> Tensor:
        """Undo the mean over processes in distributed training, because counts cover all processes already."""
        return loss * self.accelerator.num_processes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        assert target is not None
        where: dict[str, Any] = {"process_index": self.args.process_index, "processes": self.args.world_size}
        check_resumable(resume_from_checkpoint, **where, fsdp=self.is_fsdp_enabled)
        check_weights(Path(resume_from_checkpoint), target)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def unwrap(model: nn.Module) -> nn.Module:
    """Return ``model`` without the wrappers of training, autocast of its forward pass included."""
    plain: nn.Module = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    return plain


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError unless ``model`` has trainable parameters, all of them in float32 or wider."""
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of `model` requires a gradient: call `model.requires_grad_(True)`, or load it "
                         "again")  # fmt: skip
    if narrow := [name for name, dtype in trained.items() if dtype in (torch.bfloat16, torch.float16)]:
        raise ValueError(f"{narrow[0]!r} is trained in {trained[narrow[0]]}, in which small updates are rounded away: load the "
                         "model with dtype=torch.float32; to compute in bfloat16, set `bf16`")  # fmt: skip


def check_weights(folder: Path, model: nn.Module) -> None:
    """Raise ValueError unless the safetensors files of ``folder`` hold the weights of ``model``, of the same shapes.

    `Trainer` would only warn about missing or unexpected weights.
    """
    own: dict[str, Tensor] = model.state_dict()
    saved: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if not saved:
        return  # sharded by FSDP, or no checkpoint at all, which Trainer reports
    memory = {own[name].data_ptr() for name in saved if name in own}
    wrong = [name for name, shape in saved.items() if name not in own or tuple(own[name].shape) != shape]
    wrong += [name for name in own if name not in saved and own[name].data_ptr() not in memory]
    if wrong:
        raise ValueError(f"{str(folder)!r} is a checkpoint of another architecture than {type(model).__name__}: "
                         f"{wrong[0]!r} differs. Resume with the run's own model, or name another `output_dir`")  # fmt: skip


@torch.no_grad()
def mean_loss(model: nn.Module, rows: Rows, batch_size: int = 16) -> float:
    """Return the loss of ``model`` on ``rows``: the mean over tokens, in nats. Every process computes all of it."""
    check_tokens(rows, "rows", vocabulary(unwrap(model)))
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            chosen = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
            losses = token_losses(run_on(model, batch).logits, batch["labels"])
            total += losses.cpu().double().sum().item()
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total / tokens
