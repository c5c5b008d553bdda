"""`UnlearningTrainer`: one Trainer for all output-based methods, and `unlearn`, which does it in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from routed_peft.data.labels import FORGET, RETAIN
from routed_peft.routes import IGNORED
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.unlearning import rmu
from routed_peft.unlearning.arguments import UnlearningArguments
from routed_peft.unlearning.data import IS_FORGET, PairedRows, Rows, check_rows, check_tokens
from routed_peft.unlearning.losses import divergence, npo, simnpo, squared_distance, token_log_probs, uniform_divergence
from routed_peft.unlearning.reference import frozen_reference
from routed_peft.unlearning.token_trainer import TokenTrainer, unwrap

TOKENS, ROWS = 0, 1


@dataclass(frozen=True)
class Outputs:
    """What a model makes of rows: ``logits`` (B, T, V), ``hidden`` (B, T, D) of one block or None; and ``labels`` (B, T)."""

    logits: Tensor
    hidden: Tensor | None
    labels: Tensor

    def of(self, rows: Tensor) -> Outputs:
        """Return what belongs to the rows where ``rows`` ``(B,)`` is true."""
        return Outputs(self.logits[rows], None if self.hidden is None else self.hidden[rows], self.labels[rows])

    @property
    def counted(self) -> Tensor:
        """Positions that predict a token that counts, ``(B, T - 1)``."""
        return self.labels[:, 1:] != IGNORED

    def log_probs(self) -> Tensor:
        """Summed log-probability of each row, ``(B,)``."""
        return token_log_probs(self.logits, self.labels).sum(1)

    def predictions(self) -> Tensor:
        """Logits at the positions that count, ``(N, V)``."""
        return self.logits[:, :-1][self.counted]

    def activations(self) -> Tensor:
        """Activations at the positions that count, ``(N, D)``."""
        assert self.hidden is not None
        return self.hidden[:, :-1][self.counted]


class UnlearningTrainer(TokenTrainer):
    r"""Trains a model to do badly on forget rows and as before on retain rows.

    .. math:: L = \gamma\, L_{\text{forget}} + \alpha\, L_{\text{retain}}

    Every batch holds as many rows of either side, in one forward pass. Terms are means over tokens (NPO and SimNPO: over
    rows) of the whole optimizer step, however it is split into batches and processes. Plain models are trained whole; RMU
    trains a few matrices, and leaves the others frozen.

    Args:
        model: a causal language model, its weights in float32.
        args: `UnlearningArguments`; its ``num_train_epochs`` are passes over the forget rows.
        forget_rows: tokenised rows (``input_ids``; ``labels`` with -100 where only a part is to be forgotten).
        retain_rows: likewise; not needed for gradient ascent.
        reference: the model from before, for NPO, RMU and KL retention; a frozen copy of ``model`` by default. Resuming needs
            the same one again: pass the model from before as ``model``, not the checkpoint.
        **kwargs: as for `Trainer`: ``eval_dataset`` (rows, or a dict of them by name), ``callbacks``, ``processing_class``.

    Raises:
        ValueError: where a side is empty or made with another tokenizer, nothing is trainable, or ``reference`` does not fit.
    """

    args: UnlearningArguments
    training_mark = IS_FORGET

    def __init__(
        self,
        model: PreTrainedModel,
        args: UnlearningArguments,
        forget_rows: Rows,
        retain_rows: Rows | None = None,
        reference: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        sides = {"forget_rows": forget_rows} | ({"retain_rows": retain_rows} if args.uses_retain else {})
        for name, rows in sides.items():
            check_rows(rows, name)
            check_tokens(rows, name, model.config.get_text_config().vocab_size)
        args = copy.copy(args)
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.max_steps <= 0:
            args.max_steps = max(1, round(args.num_train_epochs * len(forget_rows) / per_step))
        retain = retain_rows if args.uses_retain else None
        pairs = PairedRows(forget_rows, retain, args.max_steps * per_step, args.seed)
        self._pairs, self._pairs_per_step = pairs, per_step
        self._layer = rmu.prepare(model, args) if args.method == "rmu" else None
        super().__init__(model, args, train_dataset=pairs, **kwargs)
        self.reference = None
        if args.reads_reference:
            frozen = frozen_reference(model, reference)
            self.reference = self.accelerator.prepare_model(frozen, evaluation_mode=True)
        if self._layer is not None:
            before = model.eval() if self.reference is None else self.reference
            self._target = rmu.target(before, forget_rows, self._layer, args).to(args.device)

    def count_units(self, batch: Mapping[str, Any]) -> Tensor:
        """Return tokens and rows of either side, ``(2, 2)``: forget first."""
        tokens, is_forget = (batch["labels"][:, 1:] != IGNORED).sum(1), batch[IS_FORGET]
        units = torch.stack([tokens, torch.ones_like(tokens)])  # (2, B)
        return torch.stack([units[:, is_forget].sum(1), units[:, ~is_forget].sum(1)])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the method's loss of a batch of pairs, or the cross entropy of plain rows."""
        if not self.is_training_batch(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counts = self.count_units(inputs) if num_items_in_batch is None else num_items_in_batch
        is_forget = inputs[IS_FORGET]
        now, before = self._run(model, inputs), self._before(inputs)
        values, unit = self._forget_term(now.of(is_forget), before.get(FORGET))
        loss = self.args.gamma * values.sum() / counts[0, unit]
        if self.args.uses_retain:
            values = self._retain_term(now.of(~is_forget), before.get(RETAIN))
            loss = loss + self.args.alpha * values.sum() / counts[1, TOKENS]
        loss = self.scaled(loss)
        return (loss, {"logits": now.logits}) if return_outputs else loss

    def _run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        inputs, labels = {name: inputs[name] for name in ("input_ids", "attention_mask")}, inputs["labels"]
        outputs = model(**inputs, output_hidden_states=self._layer is not None, use_cache=False)
        hidden = None if self._layer is None else _wide(outputs.hidden_states[self._layer + 1])
        return Outputs(_wide(outputs.logits), hidden, labels)

    @torch.no_grad()
    def _before(self, inputs: Mapping[str, Tensor]) -> dict[str, Outputs]:
        """Run the frozen model on the sides whose term compares with it."""
        found = {}
        for side in self.args.reads_reference:
            assert self.reference is not None
            rows = inputs[IS_FORGET] if side == FORGET else ~inputs[IS_FORGET]
            found[side] = self._run(self.reference, {name: tensor[rows] for name, tensor in inputs.items()})
        return found

    def _forget_term(self, now: Outputs, before: Outputs | None) -> tuple[Tensor, int]:
        """Return the values whose mean is the forget term, and what the mean is over."""
        args = self.args
        if args.method in ("gradient_ascent", "graddiff"):
            return token_log_probs(now.logits, now.labels), TOKENS
        if args.method == "maxent":
            return uniform_divergence(now.predictions()), TOKENS
        if args.method == "rmu":
            return squared_distance(now.activations(), self._target), TOKENS
        assert args.beta is not None
        if args.method == "simnpo":
            return simnpo(now.log_probs(), now.counted.sum(1).clamp(min=1), args.beta, args.margin), ROWS
        assert before is not None
        return npo(now.log_probs(), before.log_probs(), args.beta), ROWS

    def _retain_term(self, now: Outputs, before: Outputs | None) -> Tensor:
        """Return values whose mean over tokens is the retain term."""
        if before is None:
            return -token_log_probs(now.logits, now.labels)
        if self.args.method == "rmu":
            return squared_distance(now.activations(), before.activations())
        return divergence(before.predictions(), now.predictions())

    @property
    def ledger(self) -> TrainingCost:
        """What the steps so far have cost."""
        seen = self.state.global_step * self._pairs_per_step
        tokens = {side: self._pairs.tokens(side, seen) for side in (FORGET, RETAIN)}
        return TrainingCost.from_counts(
            parameters=matmul_parameters(self.accelerator.unwrap_model(self.model)),
            tokens=sum(tokens.values()),
            steps=self.state.global_step,
            labeled_forget_tokens=self._pairs.tokens(FORGET, seen, distinct=True),
            teacher_tokens=sum(tokens[side] for side in self.args.reads_reference),
        )


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unlearn(
    model: PreTrainedModel,
    forget_rows: Rows,
    retain_rows: Rows | None,
    args: UnlearningArguments,
    *,
    reference: nn.Module | None = None,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreTrainedModel, TrainingCost]:
    """Unlearn what ``forget_rows`` teach, in place, and return the model and what that cost.

    Args:
        model: a causal language model, its weights in float32.
        forget_rows: tokenised rows, as `routed_peft.data.pack` makes them.
        retain_rows: likewise; None for gradient ascent.
        args: says the method, its weights, and all that a `Trainer` is told.
        reference: see `UnlearningTrainer`.
        eval_dataset: rows, or rows by name, whose loss is taken as ``args.eval_strategy`` says.
        tokenizer: saved with checkpoints, if there are any.
        callbacks: of the trainer.

    Raises:
        ValueError: see `UnlearningTrainer`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, vocab_size=16)
        >>> model, rows = LlamaForCausalLM(LlamaConfig(**sizes)), [{"input_ids": [3, 4, 5, 6]}]
        >>> with TemporaryDirectory() as folder:
        ...     options = dict(max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True)
        ...     _, ledger = unlearn(model, rows, rows, UnlearningArguments(folder, method="maxent", **options))
        {'train_runtime': ...}
        >>> ledger.serial_steps, ledger.labeled_forget_tokens
        (2, 4)
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        trainer = UnlearningTrainer(
            model,
            args,
            forget_rows,
            retain_rows,
            reference,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:  # also where it diverged, and is tried again at a lower rate
        for parameter, needed in trained.items():
            parameter.requires_grad_(needed)
        for changed in (model, reference):
            if changed is not None:
                unwrap(changed)
    return model.eval(), trainer.ledger
