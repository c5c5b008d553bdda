"""`UnlearningTrainer`, one Trainer for all output-based methods, and `unlearn`, the same in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from routed_peft.data.labels import FORGET, RETAIN
from routed_peft.data.vocabulary import check_tokens
from routed_peft.deprecation import formerly_positional
from routed_peft.routes import IGNORED
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.unlearning import rmu
from routed_peft.unlearning.arguments import UnlearningArguments
from routed_peft.unlearning.data import IS_FORGET, PairedRows, Rows, check_rows, run_on
from routed_peft.unlearning.forget_losses import FORGET_LOSSES, Outputs
from routed_peft.unlearning.losses import at_least_float32, divergence, squared_distance, token_log_probs
from routed_peft.unlearning.token_trainer import TokenTrainer, unwrap

UNITS = ("tokens", "rows")


class UnlearningTrainer(TokenTrainer):
    r"""A `Trainer` that makes a model forget some rows while its loss on others stays low.

    .. math:: L = \gamma\, L_{\text{forget}} + \alpha\, L_{\text{retain}}

    Every batch holds equally many rows of either side. Terms are means over the tokens (NPO and SimNPO: rows) of the whole
    optimizer step, for any split into batches and processes. All parameters are trained; RMU trains a few matrices, and
    freezes the others.

    Args:
        model: a causal language model, its weights in float32.
        args: `UnlearningArguments`; its ``num_train_epochs`` are passes over the forget rows.
        forget_rows: tokenized rows (``input_ids``; ``labels`` with -100 where only a part is to be forgotten).
        retain_rows: likewise; not needed for gradient ascent.
        reference: the original model, for NPO, RMU and KL retention; a frozen copy of ``model`` by default. A run that
            resumes needs the same one: pass the original as ``model``, not the checkpoint.
        **kwargs: as for `Trainer`: ``eval_dataset`` (rows, or a dict of them by name), ``callbacks``, ``processing_class``.

    Raises:
        ValueError: on an empty side, rows of another tokenizer, a model without trainable parameters, or a ``reference`` of
            another architecture.
    """

    args: UnlearningArguments
    training_mark = IS_FORGET

    def __init__(
        self,
        model: PreTrainedModel,
        args: UnlearningArguments,
        *,
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
        pairs = PairedRows(forget_rows, retain, count=args.max_steps * per_step, seed=args.seed)
        self._pairs, self._pairs_per_step = pairs, per_step
        self._forget_loss = FORGET_LOSSES[args.method]
        self._layer = rmu.prepare(model, args) if self._forget_loss.steers else None
        self._target: Tensor | None = None
        super().__init__(model, args, train_dataset=pairs, **kwargs)
        frozen = frozen_reference(model, reference) if args.reads_reference else None
        self.reference = None if frozen is None else self.accelerator.prepare_model(frozen, evaluation_mode=True)
        if self._layer is not None:
            before = model.eval() if self.reference is None else self.reference
            self._target = rmu.target(before, forget_rows, layer=self._layer, args=args).to(args.device)

    def count_units(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the numbers of tokens and rows of either side, ``(2, 2)``: forget first."""
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
        values = self._forget_loss.function(now.select(is_forget), before.get(FORGET), self.args)
        loss = self.args.gamma * values.sum() / counts[0, UNITS.index(self._forget_loss.unit)]
        if self.args.uses_retain:
            values = self._retain_term(now.select(~is_forget), before.get(RETAIN))
            loss = loss + self.args.alpha * values.sum() / counts[1, UNITS.index("tokens")]
        loss = self.scaled(loss)
        return (loss, {"logits": now.logits}) if return_outputs else loss

    def _run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Outputs:
        outputs = run_on(model, inputs, output_hidden_states=self._layer is not None)
        hidden = None if self._layer is None else at_least_float32(outputs.hidden_states[self._layer + 1])
        return Outputs(at_least_float32(outputs.logits), hidden, inputs["labels"], self._target)

    @torch.no_grad()
    def _before(self, inputs: Mapping[str, Tensor]) -> dict[str, Outputs]:
        """Run the frozen model on the sides whose term compares with it; return its outputs by side."""
        found = {}
        for side in self.args.reads_reference:
            assert self.reference is not None
            rows = inputs[IS_FORGET] if side == FORGET else ~inputs[IS_FORGET]
            found[side] = self._run(self.reference, {name: tensor[rows] for name, tensor in inputs.items()})
        return found

    def _retain_term(self, now: Outputs, before: Outputs | None) -> Tensor:
        """Return values whose mean over tokens is the retain term."""
        if before is None:
            return -token_log_probs(now.logits, now.labels)
        if self._forget_loss.steers:
            return squared_distance(now.activations(), before.activations())
        return divergence(before.predictions(), now.predictions())

    @property
    def ledger(self) -> TrainingCost:
        """Cost of the steps so far."""
        seen = self.state.global_step * self._pairs_per_step
        tokens = {side: self._pairs.tokens(side, seen) for side in (FORGET, RETAIN)}
        return TrainingCost.from_counts(
            parameters=matmul_parameters(self.accelerator.unwrap_model(self.model)),
            tokens=sum(tokens.values()),
            steps=self.state.global_step,
            labeled_forget_tokens=self._pairs.tokens(FORGET, seen, distinct=True),
            teacher_tokens=sum(tokens[side] for side in self.args.reads_reference),
        )


def frozen_reference(model: nn.Module, reference: nn.Module | None = None) -> nn.Module:
    """Return ``reference``, a model of the same architecture, or else a copy of ``model``: frozen, in evaluation mode."""
    if reference is model:
        raise ValueError("`reference` is `model` itself, which training changes: pass a copy, or None")
    if reference is not None:
        got, wanted = ({key: tuple(p.shape) for key, p in each.named_parameters()} for each in (reference, model))
        if odd := sorted({key for key in got.keys() | wanted.keys() if got.get(key) != wanted.get(key)}):
            raise ValueError(f"`reference` ({type(reference).__name__}) is of another architecture than `model` "
                             f"({type(model).__name__}): {odd[0]!r} has the shape {got.get(odd[0], 'none')}, expected "
                             f"{wanted.get(odd[0], 'none')}. Both must be checkpoints of one model")  # fmt: skip
    frozen = copy.deepcopy(model) if reference is None else reference
    return frozen.requires_grad_(False).eval()


@formerly_positional("retain_rows", "args")
def unlearn(
    model: PreTrainedModel,
    forget_rows: Rows,
    *,
    retain_rows: Rows | None,
    args: UnlearningArguments,
    reference: nn.Module | None = None,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[PreTrainedModel, TrainingCost]:
    """Unlearn ``forget_rows`` in place, and return the model and the cost.

    Args:
        model: a causal language model, its weights in float32; with the rows and ``reference`` see `UnlearningTrainer`.
        eval_dataset: rows, or rows by name, evaluated at the times of ``args.eval_strategy``.
        tokenizer: saved with checkpoints, if there are any.

    >>> from tempfile import TemporaryDirectory
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, vocab_size=16)
    >>> model, rows = LlamaForCausalLM(LlamaConfig(**sizes)), [{"input_ids": [3, 4, 5, 6]}]
    >>> with TemporaryDirectory() as folder:
    ...     options = dict(max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True)
    ...     args = UnlearningArguments(folder, method="maxent", **options)
    ...     _, ledger = unlearn(model, rows, retain_rows=rows, args=args)
    {'train_runtime': ...}
    >>> ledger.serial_steps, ledger.labeled_forget_tokens
    (2, 4)
    """
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        more: dict[str, Any] = {"eval_dataset": eval_dataset, "processing_class": tokenizer, "callbacks": [*callbacks]}
        trainer = UnlearningTrainer(
            model, args, forget_rows=forget_rows, retain_rows=retain_rows, reference=reference, **more
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:  # also where it diverged, and is tried again at a lower rate
        for parameter, needed in trained.items():
            parameter.requires_grad_(needed)
        for changed in (model, reference):
            if changed is not None:
                unwrap(changed)
    return model.eval(), trainer.ledger
