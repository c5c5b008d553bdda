"""Arguments of unlearning runs, added to `transformers.TrainingArguments`; YAML keys have the same names."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from routed_peft.mistakes import check_choices, option
from routed_peft.training.arguments import check_training_numbers
from routed_peft.unlearning.forget_losses import FORGET_LOSSES

METHODS = FORGET_LOSSES.keys()
"""Names of the methods; those of `register_forget_loss` appear here too."""
RETAIN_LOSSES = ("ce", "kl")


@dataclass
class UnlearningArguments(TrainingArguments):
    """`transformers.TrainingArguments` for `UnlearningTrainer`; a ValueError names a value out of range.

    >>> args = UnlearningArguments("out", method="npo", report_to="none")
    >>> args.beta, args.uses_retain, args.reads_reference
    (0.1, True, ('forget',))
    """

    method: str = option("graddiff", "Loss on forget rows; see docs/recipes.md.", choices=METHODS)
    gamma: float = option(1.0, "Weight of the forget term.")
    alpha: float = option(1.0, "Weight of the retain term; gradient_ascent has none.")
    retain_loss: str = option("ce", "Retain term: cross entropy, or KL from the original model. RMU has its "
        "own.", choices=RETAIN_LOSSES)  # fmt: skip
    beta: float | None = option(None, "Inverse temperature; by default 0.1 for NPO and 2.5 for SimNPO.")
    margin: float = option(0.0, "SimNPO: gamma of its paper.")
    steering: float = option(5.0, "RMU: length of the target activation, times the typical one if relative.")
    steering_relative: bool = option(True, "RMU: measure the typical length on forget rows, and multiply by it.")
    rmu_layer: int | None = option(None, "RMU: block whose output is steered, from 0; the middle one by default.")
    rmu_train_layers: list[int] | None = option(None, "RMU: blocks whose MLP output projections are trained; three up "
        "to `rmu_layer` by default.")  # fmt: skip

    def __post_init__(self) -> None:
        check_choices(self)
        if self.beta is None:
            self.beta = FORGET_LOSSES[self.method].beta
        for name in ("gamma", "alpha", "beta", "steering"):
            value = getattr(self, name)
            if value is not None and not (0 < value < float("inf") or (value == 0 and name == "alpha")):
                raise ValueError(f"`{name}` must be a positive number, got {value}")
        super().__post_init__()
        plain_batches(self)

    @property
    def uses_retain(self) -> bool:
        """Whether retain rows are trained on."""
        return FORGET_LOSSES[self.method].uses_retain and self.alpha > 0

    @property
    def reads_reference(self) -> tuple[str, ...]:
        """Sides on which the frozen original is run."""
        loss = FORGET_LOSSES[self.method]
        forget, retain = loss.reads_reference, self.uses_retain and (self.retain_loss == "kl" or loss.steers)
        return ("forget",) * forget + ("retain",) * retain


@dataclass
class UndoArguments(TrainingArguments):
    """`transformers.TrainingArguments` for `undo`; ``max_steps`` limits distillation.

    >>> args = UndoArguments("out", alpha=0.4, report_to="none")
    >>> args.alpha, args.beta, args.tolerance
    (0.4, 0.1, 0.05)
    """

    alpha: float = option(0.6, "How far weights are moved to their initialization: 0 not at all, 1 all the way.")
    beta: float = option(0.1, "Share of the initialization's noise in that.")
    tolerance: float = option(0.05, "Stop once the retain loss is within this share of the teacher's.")
    topk: int | None = option(None, "Number of the teacher's outputs stored per token first; by default it runs in "
        "every step.")  # fmt: skip
    teacher_cache: str | None = option(None, "Directory of the stored outputs; OUTPUT_DIR/teacher by default.")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"`tolerance` must not be negative, got {self.tolerance}")
        if self.topk is not None and self.topk < 1:
            raise ValueError(f"`topk` must be at least 1, got {self.topk}")
        if self.teacher_cache and self.topk is None:
            raise ValueError("`teacher_cache` needs `topk`, the number of the teacher's outputs to store per token")
        super().__post_init__()
        plain_batches(self)


def plain_batches(args: TrainingArguments) -> None:
    """Set the arguments on which the datasets and batches of this package depend."""
    check_training_numbers(args)
    args.dataloader_pin_memory &= args.device.type != "cpu"
    args.remove_unused_columns = False  # batches are made by our own collator
    args.train_sampling_strategy = "sequential"  # the datasets are in order already
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
