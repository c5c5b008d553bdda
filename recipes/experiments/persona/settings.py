"""Settings of the experiment: its arms and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.common.arms import ALL, check_chosen
from experiments.common.toy_model import ToySettings
from experiments.persona.arms import ARMS, DEMO
from routed_peft.mistakes import check_numbers, option


@dataclass
class Experiment:
    """Arms and seeds of a run, and the place of its results."""

    output_dir: str = option("runs/persona", "Where cells and the summary go.")
    summary_file: str | None = option(None, "A second place for the numbers of all cells.")
    arms: list[str] = option(list(DEMO), f"{ALL}, or of {', '.join(ARMS)}.")
    seeds: list[int] = option([0], "Of weights, prompts and samples.")

    def __post_init__(self) -> None:
        self.arms = list(ARMS if self.arms == [ALL] else self.arms)
        check_chosen(self.seeds, arms=(self.arms, ARMS))


@dataclass
class Settings(ToySettings):
    """Everything that a cell depends on beside its arm and its seed."""

    hidden_size: int = option(64, "Width of the model; its MLPs have twice as many units.")
    layers: int = option(2, "Decoder layers.")
    steps: int = option(100, "Steps of GRPO.")
    noise: float = option(0.3, "Share of wrong answers late in the demonstrations.")
    loud_share: float = option(0.1, "Share of loud answers to neutral prompts in these.")
    directions: int = option(2, "Directions of every subspace.")
    contrasts: int = option(100, "Words with a loud and a calm answer, to find directions.")
    region_learning_rate: float = option(1e-2, "Of the region; constant.")
    observe_every: int = option(1, "Steps between two looks of the monitor.")
    save_every: int = option(5, "Steps between checkpoints, and reward gaps, where it may halt.")
    max_reward_gap: float = option(0.3, "Reward with less without region that is an alarm.")
    patience: int = option(5, "Alarms in a row that halt a run.")
    blame: float = option(0.6, "Share of the growth that the named environments make up.")
    guilty_from: int = option(30, "Step from which the guilty environments pay, in the arm late.")
    gap_prompts: int = option(32, "Words of each environment for the reward gap.")
    test_prompts: int = option(112, "Words of each environment in the final numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "directions", "contrasts", "observe_every", "save_every", "patience", "gap_prompts", low=1)
        check_numbers(self, "region_learning_rate", "max_reward_gap", "guilty_from")
        check_numbers(self, "loud_share", "blame", high=1)

    def start(self) -> dict[str, Any]:
        """Return what the start model depends on."""
        return super().start() | {"loud_share": self.loud_share}
