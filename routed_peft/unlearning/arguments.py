"""Arguments of unlearning runs, added to `transformers.TrainingArguments`; YAML keys have the same names."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

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

    method: str = field(
        default="graddiff", metadata={"help": "Loss on forget rows; see docs/recipes.md.", "choices": METHODS}
    )
    gamma: float = field(default=1.0, metadata={"help": "Weight of the forget term."})
    alpha: float = field(default=1.0, metadata={"help": "Weight of the retain term; gradient_ascent has none."})
    retain_loss: str = field(
        default="ce",
        metadata={
            "help": "Retain term: cross entropy, or KL from the original model. RMU has its own.",
            "choices": RETAIN_LOSSES,
        },
    )
    beta: float | None = field(
        default=None, metadata={"help": "Inverse temperature; by default 0.1 for NPO and 2.5 for SimNPO."}
    )
    margin: float = field(default=0.0, metadata={"help": "SimNPO: gamma of its paper."})
    steering: float = field(
        default=5.0, metadata={"help": "RMU: length of the target activation, times the typical one if relative."}
    )
    steering_relative: bool = field(
        default=True, metadata={"help": "RMU: measure the typical length on forget rows, and multiply by it."}
    )
    rmu_layer: int | None = field(
        default=None, metadata={"help": "RMU: block whose output is steered, from 0; the middle one by default."}
    )
    rmu_train_layers: list[int] | None = field(
        default=None,
        metadata={"help": "RMU: blocks whose MLP output projections are trained; three up to `rmu_layer` by default."},
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.retain_loss not in RETAIN_LOSSES:
            raise ValueError(f"`retain_loss` must be one of {', '.join(RETAIN_LOSSES)}, got {self.retain_loss!r}")
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

    alpha: float = field(
        default=0.6,
        metadata={"help": "How far weights are moved to their initialization: 0 not at all, 1 all the way."},
    )
    beta: float = field(default=0.1, metadata={"help": "Share of the initialization's noise in that."})
    tolerance: float = field(
        default=0.05, metadata={"help": "Stop once the retain loss is within this share of the teacher's."}
    )
    topk: int | None = field(
        default=None,
        metadata={"help": "Number of the teacher's outputs stored per token first; by default it runs in every step."},
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Directory of the stored outputs; OUTPUT_DIR/teacher by default."}
    )

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
