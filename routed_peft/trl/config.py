"""TRL's configurations with the fields of `RoutedArguments`, and options of routed GRPO."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, SFTConfig

from routed_peft.mistakes import option
from routed_peft.training import RoutedArguments


@dataclass
class RoutedSFTConfig(RoutedArguments, SFTConfig):
    """`trl.SFTConfig` for `RoutedSFTTrainer`.

    >>> args = RoutedSFTConfig("out", base_adapters=["retain"], bf16=False, report_to="none")
    >>> args.max_length, args.base_adapters
    (1024, ['retain'])
    """


@dataclass
class RoutedGRPOConfig(RoutedArguments, GRPOConfig):
    """`trl.GRPOConfig` for `RoutedGRPOTrainer`.

    ``clip_per_group`` is on by default: rewards come in bursts, and a burst of the region's gradient would otherwise
    shrink the update of the base.

    >>> args = RoutedGRPOConfig("out", anchor_environments=["secure"], bf16=False, report_to="none")
    >>> args.anchor_share, args.baseline_over, args.clip_per_group
    (0.25, 'group', True)

    Raises:
        ValueError: on an ``anchor_share`` outside [0, 1), an unknown ``baseline_over``, and combinations of the two with
            options of TRL that would make them wrong.
    """

    clip_per_group: bool | None = option(True, "Clip base and regions to `max_grad_norm` separately, so that neither "
        "shrinks the other's update.")  # fmt: skip
    flagged_labels: list[str] = option(["flagged"], "Labels that count as flagged: for `baseline_over`, for anchor "
        "rollouts, and in the metrics.")  # fmt: skip
    baseline_over: str = option("group", "Rollouts whose mean reward is the baseline: the whole `group`, or its "
        "`unflagged` rollouts (the whole group if all are flagged), so that flagged rewards do not lower the "
        "advantages of honest rollouts.", choices=["group", "unflagged"])  # fmt: skip
    anchor_share: float = option(None, "Share of the prompts of a generation batch that are sampled with all regions "
        "ablated. Their unflagged rollouts take the label `anchor`, which trains the base alone. By default 0.25 where "
        "`anchor_environments` are named, and 0 elsewhere.")  # fmt: skip
    anchor_environments: list[str] | None = option(None, "Environments whose prompts may be anchors (trusted ones); "
        "all by default.")  # fmt: skip
    environment_column: str = option("environment", "Dataset column of a prompt's environment.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor_share is None:
            self.anchor_share = 0.25 if self.anchor_environments else 0.0
        if self.baseline_over == "unflagged" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError('`baseline_over="unflagged"` needs `multi_objective_aggregation="sum_then_normalize"`, got '
                             f"{self.multi_objective_aggregation!r}: separately normalized rewards have no baseline of their "
                             "sum")  # fmt: skip
        if not 0 <= self.anchor_share < 1:
            raise ValueError(f"`anchor_share` is a share of the prompts, from 0 to below 1, got {self.anchor_share}")
        if self.anchor_environments is not None and not self.anchor_share:
            raise ValueError("`anchor_environments` is set, but `anchor_share` is 0: set a share, such as 0.25")
        if self.anchor_share and self.use_transformers_continuous_batching:
            raise ValueError("`anchor_share` with `use_transformers_continuous_batching`: it mixes rows whose regions differ. "
                             "Use ordinary generation")  # fmt: skip
