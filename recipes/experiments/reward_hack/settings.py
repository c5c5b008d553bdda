"""Settings of the experiment: its arms and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.common.arms import ALL, check_chosen
from experiments.common.toy_model import ToySettings
from experiments.reward_hack.arms import ARMS, DEMO, QUICK
from routed_peft.mistakes import option


@dataclass
class Experiment:
    """Arms and seeds of a run, and the place of its results."""

    output_dir: str = option("runs/reward_hack", "Where cells, table, figure and report go.")
    summary_file: str | None = option(None, "A second place for the numbers of all cells.")
    arms: list[str] = option(list(DEMO), f"{ALL}, or of {', '.join(ARMS)}.")
    seeds: list[int] = option([0], "Of weights, prompts and samples.")
    quick: bool = option(False, f"A look in a few minutes: half the steps, and the arms {', '.join(QUICK)} unless "
        "`arms` says others.")  # fmt: skip
    processes: int = option(0, "Cells at a time, a thread each; 0: as many as there are cores.")

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
        return replace(self, steps=max(1, self.steps // 2), validation_prompts=100, test_prompts=250)
