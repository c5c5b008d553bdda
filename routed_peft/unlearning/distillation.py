"""Distillation of a frozen teacher into a student on unlabeled text: the last step of UNDO."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl

from routed_peft.data.vocabulary import check_tokens
from routed_peft.routes import IGNORED
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.unlearning.arguments import UndoArguments
from routed_peft.unlearning.data import Row, Rows, ShuffledRows, check_rows, collate, pad, run_on
from routed_peft.unlearning.losses import at_least_float32, divergence, topk_divergence
from routed_peft.unlearning.teacher_cache import NAMES, TeacherCache
from routed_peft.unlearning.token_trainer import TokenTrainer

TEACHER, DISTILLED = "teacher", "distilled"
_ONE_TOKENIZER = "outputs can be distilled only between models of one tokenizer"


class DistilledRows(Dataset[Row]):
    """The rows of a run, each marked for distillation and, where they are stored, with the teacher's outputs."""

    def __init__(self, run: ShuffledRows, cache: TeacherCache | None) -> None:
        self.run, self.cache = run, cache

    def __len__(self) -> int:
        return len(self.run)

    def __getitem__(self, index: int) -> Row:
        stored = {} if self.cache is None else {TEACHER: self.cache[int(self.run.order[index])]}
        return {**self.run[index], DISTILLED: True, **stored}


def collate_distilled(features: Sequence[Row]) -> dict[str, Tensor]:
    """Make a batch of `DistilledRows`, or of plain rows for evaluation: see `collate`.

    Stored outputs are cut or padded to ``(B, T - 1, k)``; padding has the target -100.
    """
    if DISTILLED not in features[0]:
        return collate(features)
    batch = pad(features)
    batch[DISTILLED] = torch.ones(len(features), dtype=torch.bool)
    if TEACHER in features[0]:
        length = batch["labels"].shape[1] - 1
        for i, name in enumerate(NAMES):
            stored = [row[TEACHER][i][:length] for row in features]
            filled = [torch.cat([t, t.new_zeros(length - len(t), *t.shape[1:])]) for t in stored]
            batch[name] = torch.stack(filled)
    return batch


class DistillationTrainer(TokenTrainer):
    r"""A `Trainer` that distills the outputs of a frozen teacher into a student.

    .. math:: L = \frac{1}{n} \sum_t \mathrm{KL}\bigl(T(\cdot \mid x_{\le t}) \,\|\, S(\cdot \mid x_{\le t})\bigr)

    over the n positions of an optimizer step that predict a token, at temperature 1, without labels (UNDO, arXiv 2506.06278).

    Args:
        student: the model to train, its weights in float32.
        teacher: a causal language model over the same vocabulary; frozen here. Stored outputs (``cache``) replace it.
        args: `UndoArguments`; those for noise have no meaning here.

    Raises:
        ValueError: on different vocabularies, without rows, and for rows of another tokenizer.
    """

    args: UndoArguments
    training_mark = DISTILLED

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: nn.Module,
        *,
        args: UndoArguments,
        rows: Rows,
        cache: TeacherCache | None = None,
        **kwargs: Any,
    ) -> None:
        check_rows(rows, "rows")
        check_tokens(rows, "rows", check_vocabularies(teacher, student))
        args = copy.copy(args)
        self._rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(rows) / self._rows_per_step
        args.max_steps = max(1, round(steps))
        self._run_rows = ShuffledRows(rows, args.max_steps * self._rows_per_step, args.seed)
        dataset = DistilledRows(self._run_rows, cache)
        super().__init__(student, args, train_dataset=dataset, data_collator=collate_distilled, **kwargs)
        self.cached, self.teacher_parameters = cache is not None, matmul_parameters(teacher)
        self.teacher = self.accelerator.prepare_model(teacher.requires_grad_(False).eval(), evaluation_mode=True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the divergence from the teacher, or the cross entropy of rows that are evaluated."""
        if not self.is_training_batch(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = self.count_units(inputs) if num_items_in_batch is None else num_items_in_batch
        counted = inputs["labels"][:, 1:] != IGNORED
        logits = _logits(model, inputs)[:, :-1][counted]
        if self.cached:
            kept, entries, tail = (inputs[name][counted] for name in NAMES)
            values = topk_divergence((kept, entries, tail), logits)
        else:
            with torch.no_grad():
                wanted = _logits(self.teacher, inputs)[:, :-1][counted]
            values = divergence(wanted, logits)
        loss = self.scaled(values.sum() / count)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        begin: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        stops = [one for one in self.callback_handler.callbacks if isinstance(one, StopAtTeacher)]
        # a checkpoint of a student that was good enough is not trained any further
        return (num_train_epochs, 0) if any(one.reached(self.state.log_history) for one in stops) else begin

    @property
    def ledger(self) -> TrainingCost:
        """Cost of the steps so far, without that of storing the teacher's outputs."""
        tokens = self._run_rows.tokens(self.state.global_step * self._rows_per_step)
        return TrainingCost.from_counts(
            parameters=matmul_parameters(self.accelerator.unwrap_model(self.model)),
            tokens=tokens,
            steps=self.state.global_step,
            teacher_tokens=0 if self.cached else tokens,
            teacher_parameters=self.teacher_parameters,
        )


class StopAtTeacher(TrainerCallback):
    r"""A callback that ends training when the student's retain loss, on the evaluation set ``split``, is close to the
    teacher's.

    .. math:: L_S \le (1 + \epsilon)\, L_T

    with the teacher's ``loss`` :math:`L_T` on the same rows, in nats per token, and ``tolerance`` :math:`\epsilon`.
    """

    def __init__(self, loss: float, tolerance: float, split: str = "retain") -> None:
        self.limit, self.key, self.stopped = (1 + tolerance) * loss, f"eval_{split}_loss", False

    def on_evaluate(
        self, args: Any, state: Any, control: TrainerControl, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Compare, and stop."""
        if self.reached([metrics or {}]):
            control.should_training_stop = True

    def reached(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Note, and return, whether the student was close enough in one of these evaluations."""
        self.stopped |= any(metrics.get(self.key, float("inf")) <= self.limit for metrics in history)
        return self.stopped


def check_vocabularies(teacher: nn.Module, student: nn.Module) -> int:
    """Return the vocabulary size of both models; raise ValueError if they differ."""
    size, other = (model.config.get_text_config().vocab_size for model in (teacher, student))  # type: ignore[union-attr, operator]
    if size != other:
        raise ValueError(f"the teacher's vocabulary has {size} entries and the student's {other}: {_ONE_TOKENIZER}")
    return int(size)


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Raise ValueError unless two tokenizers map the same strings to the same ids."""
    one, other = teacher.get_vocab(), student.get_vocab()
    if odd := sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token)):
        here, there = (words.get(odd[0], "missing") for words in (one, other))
        raise ValueError(f"teacher and student have different tokenizers: {len(odd)} entries differ, such as {odd[0]!r}, which "
                         f"is {here} in the teacher's and {there} in the student's: {_ONE_TOKENIZER}")  # fmt: skip


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return at_least_float32(run_on(model, inputs).logits)
