"""Arguments added to `transformers.TrainingArguments`; YAML keys and flags have the same names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainingArguments

from routed_peft.adapters import adapter_names, routing_record
from routed_peft.mistakes import check_choices, check_numbers, option


@dataclass
class RoutedArguments:
    """Mix-in of the added fields, also for TRL's configurations."""

    train_base: bool | None = option(None, "Train the model's own weights as well as its adapters; by default as in "
        "the run that is continued, if any.")  # fmt: skip
    base_adapters: list[str] = option([], "Adapters that are part of the base and stay, such as a `retain` LoRA; by "
        "default those of the run that is continued, if any.")  # fmt: skip
    kept_regions: list[str] = option([], "Regions that belong to the model, as in a run without routing: evaluation "
        "and attacks load them unless told otherwise.")  # fmt: skip
    edges: str = option("parameters", "`parameters` (exact, SGTM) or `activations` (the published ERA "
        "mask).", choices=["parameters", "activations"])  # fmt: skip
    route_layers: list[int] | None = option(None, "Decoder layers whose base is routed; all by default.")
    joint: list[str] = option([], "Base modules that train on all data: `embeddings`, `norms`, `head`, or suffixes of "
        "module names.")  # fmt: skip
    region_learning_rate: float | None = option(None, "Peak learning rate of the regions; that of the base by default.")
    region_weight_decay: float | None = option(None, "Weight decay of the regions; that of the base by default.")
    clip_per_group: bool | None = option(None, "Clip base and regions to `max_grad_norm` separately, so that data of "
        "one neither shrinks nor spoils the other's update; by default wherever some route has a weight of 0 or an "
        "ablated region.")  # fmt: skip
    activation_l1: float = option(0.0, "ERA's penalty: this times the mean L1 norm of MLP activations, summed over "
        "layers.")  # fmt: skip
    evaluate_ablated: bool = option(True, "Evaluate a second time with all regions ablated: `eval_ablated_…`.")
    self_check: bool = option(True, "On the first batch, try every label; raise where a gradient reaches the wrong "
        "group.")  # fmt: skip
    check_labels_after: int = option(100, "On a stream: raise if nothing was routed in this many steps, and warn if a "
        "region had no data. 0: check at the end only.")  # fmt: skip
    gather: bool = option(True, "Skip positions of weight zero in weight-gradient matmuls; ignored under "
        "torch_compile.")  # fmt: skip

    def continue_run(self, model: nn.Module) -> None:
        """Fill in what was left open from the run that ``model`` was loaded from, if any."""
        record, names = routing_record(model), adapter_names(model)
        self.train_base = record.continues_base if self.train_base is None else self.train_base
        self.base_adapters = self.base_adapters or [name for name in record.base_adapters if name in names]
        self.kept_regions = self.kept_regions or [name for name in record.kept_regions if name in names]

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self, "region_learning_rate", "region_weight_decay", "activation_l1", "check_labels_after")
        check_training_numbers(self)
        super().__post_init__()  # type: ignore[misc]  # of the host's arguments
        host: Any = self
        if host.ddp_find_unused_parameters is None:
            host.ddp_find_unused_parameters = False  # routed gradients are zero, never None


def check_training_numbers(args: Any) -> None:
    """Raise ValueError where a number of `transformers.TrainingArguments` is out of range."""
    check_numbers(args, "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "adam_epsilon")
    check_numbers(args, "seed", high=2**32 - 1)
    check_numbers(args, "adam_beta1", "adam_beta2", high=1)
    counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    check_numbers(args, *counts, low=1)


@dataclass
class RoutedTrainingArguments(RoutedArguments, TrainingArguments):
    """`transformers.TrainingArguments` for `RoutedTrainer`.

    >>> args = RoutedTrainingArguments("out", train_base=True, report_to="none")
    >>> args.output_dir, args.edges
    ('out', 'parameters')
    """
