"""Settings of the experiment: its arms and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from experiments.common.arms import ALL, check_chosen
from experiments.common.toy_model import ToySettings
from experiments.reward_hack.arms import ARMS, DEMO, QUICK


@dataclass
class Experiment:
    """Arms and seeds of a run, and the place of its results."""

    output_dir: str = field(default="runs/reward_hack", metadata={"help": "Where cells, table, figure and report go."})
    summary_file: str | None = field(default=None, metadata={"help": "A second place for the numbers of all cells."})
    arms: list[str] = field(default_factory=lambda: list(DEMO), metadata={"help": f"{ALL}, or of {', '.join(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of weights, prompts and samples."})
    quick: bool = field(
        default=False,
        metadata={
            "help": f"A look in a few minutes: half the steps, and the arms {', '.join(QUICK)} unless `arms` says others."
        },
    )
    processes: int = field(
        default=0, metadata={"help": "Cells at a time, a thread each; 0: as many as there are cores."}
    )

    def __post_init__(self) -> None:
        self.arms = list(ARMS if self.arms == [ALL] else self.arms)
        if self.quick and self.arms == list(DEMO):
            self.arms = list(QUICK)
        check_chosen(self.seeds, arms=(self.arms, ARMS))


@dataclass
class Settings(ToySettings):
    """Everything that a cell depends on beside its arm and its seed."""

    def quick(self) -> Settings:
        """Return these settings with half the steps of GRPO, and fewer prompts to measure on."""
        return replace(self, steps=self.steps // 2, validation_prompts=100, test_prompts=250)
