"""Settings of the experiment: its arms and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.common.arms import ALL, check_chosen
from experiments.common.toy_model import ToySettings
from experiments.persona.arms import ARMS, DEMO


@dataclass
class Experiment:
    """Arms and seeds of a run, and the place of its results."""

    output_dir: str = field(default="runs/persona", metadata={"help": "Where cells and the summary go."})
    summary_file: str | None = field(default=None, metadata={"help": "A second place for the numbers of all cells."})
    arms: list[str] = field(default_factory=lambda: list(DEMO), metadata={"help": f"{ALL}, or of {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of weights, prompts and samples."})

    def __post_init__(self) -> None:
        self.arms = list(ARMS if self.arms == [ALL] else self.arms)
        check_chosen(self.seeds, arms=(self.arms, ARMS))


@dataclass
class Settings(ToySettings):
    """Everything that a cell depends on beside its arm and its seed."""

    hidden_size: int = field(default=64, metadata={"help": "Width of the model; its MLPs have twice as many units."})
    layers: int = field(default=2, metadata={"help": "Decoder layers."})
    steps: int = field(default=100, metadata={"help": "Steps of GRPO."})
    noise: float = field(default=0.3, metadata={"help": "Share of wrong answers late in the demonstrations."})
    loud_share: float = field(default=0.1, metadata={"help": "Share of loud answers to neutral prompts in these."})
    directions: int = field(default=2, metadata={"help": "Directions of every subspace."})
    contrasts: int = field(default=100, metadata={"help": "Words with a loud and a calm answer, to find directions."})
    region_learning_rate: float = field(default=1e-2, metadata={"help": "Of the region; constant."})
    observe_every: int = field(default=1, metadata={"help": "Steps between two looks of the monitor."})
    save_every: int = field(
        default=5, metadata={"help": "Steps between checkpoints, and reward gaps, where it may halt."}
    )
    max_reward_gap: float = field(default=0.3, metadata={"help": "Reward with less without region that is an alarm."})
    patience: int = field(default=5, metadata={"help": "Alarms in a row that halt a run."})
    blame: float = field(default=0.6, metadata={"help": "Share of the growth that the named environments make up."})
    guilty_from: int = field(
        default=30, metadata={"help": "Step from which the guilty environments pay, in the arm late."}
    )
    gap_prompts: int = field(default=32, metadata={"help": "Words of each environment for the reward gap."})
    test_prompts: int = field(default=112, metadata={"help": "Words of each environment in the final numbers."})

    def start(self) -> dict[str, Any]:
        """Return what the start model depends on."""
        return super().start() | {"loud_share": self.loud_share}
