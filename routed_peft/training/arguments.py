"""Arguments added to `transformers.TrainingArguments`; YAML keys and flags have the same names."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class RoutedArguments:
    """Mix-in of the added fields, also for TRL's configurations."""

    train_base: bool = field(default=False, metadata={"help": "Train the model's own weights as well as its adapters."})
    base_adapters: list[str] = field(
        default_factory=list,
        metadata={"help": "Adapters that are part of the base and stay, such as a `retain` LoRA."},
    )
    kept_regions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Regions that belong to the model, as in a run without routing: evaluation and attacks load them unless "
            "told otherwise."
        },
    )
    edges: str = field(
        default="parameters",
        metadata={
            "help": "`parameters` (exact, SGTM) or `activations` (the published ERA mask).",
            "choices": ["parameters", "activations"],
        },
    )
    route_layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers whose base is routed; all by default."}
    )
    joint: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Base modules that train on all data: `embeddings`, `norms`, `head`, or suffixes of module names."
        },
    )
    region_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the regions; that of the base by default."}
    )
    region_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the regions; that of the base by default."}
    )
    clip_per_group: bool = field(
        default=False,
        metadata={
            "help": "Clip base and regions to `max_grad_norm` separately, so that neither shrinks the other's update."
        },
    )
    activation_l1: float = field(
        default=0.0,
        metadata={"help": "ERA's penalty: this times the mean L1 norm of MLP activations, summed over layers."},
    )
    evaluate_ablated: bool = field(
        default=True, metadata={"help": "Evaluate a second time with all regions ablated: `eval_ablated_…`."}
    )
    self_check: bool = field(
        default=True,
        metadata={"help": "On the first batch, try every label; raise where a gradient reaches the wrong group."},
    )
    check_labels_after: int = field(
        default=100,
        metadata={
            "help": "On a stream: raise if nothing was routed in this many steps, and warn if a region had no data. 0: check "
            "at the end only."
        },
    )
    gather: bool = field(
        default=True,
        metadata={"help": "Skip positions of weight zero in weight-gradient matmuls; ignored under torch_compile."},
    )


@dataclass
class RoutedTrainingArguments(RoutedArguments, TrainingArguments):
    """`transformers.TrainingArguments` for `RoutedTrainer`.

    Example:
        >>> args = RoutedTrainingArguments("out", train_base=True, report_to="none")
        >>> args.output_dir, args.edges
        ('out', 'parameters')
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # routed gradients are zero, never None
