"""What the experiment is told: which arms and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from experiments.common.cells import ALL, digest
from experiments.common.toy_model import ToySettings
from experiments.reward_hack.arms import ARMS, DEMO, QUICK


@dataclass
class Experiment:
    """Which arms and seeds are run, and where they go."""

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
        self.arms = list(ARMS) if self.arms == [ALL] else list(self.arms)
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise ValueError(f"`arms` has {unknown}; the arms are {list(ARMS)}, or {ALL!r} alone")
        if self.quick and self.arms == list(DEMO):
            self.arms = list(QUICK)
        if not self.seeds:
            raise ValueError("`seeds` is empty: give at least one, such as `--seeds 0`")


@dataclass
class Settings(ToySettings):
    """Everything that a cell depends on beside its arm and its seed."""

    def quick(self) -> Settings:
        """Return these settings with half the steps of GRPO, and fewer prompts to measure on."""
        return replace(self, steps=self.steps // 2, validation_prompts=100, test_prompts=250)


def start_key(settings: Settings, seed: int) -> str:
    """Return the name of the directory of a start model."""
    return f"start-{seed}-{digest(settings.start())}"


def cell_key(arm: str, settings: Settings, seed: int) -> str:
    """Return the name of the directory of a cell, after all that it depends on."""
    return f"{arm}-{seed}-{digest(asdict(ARMS[arm]), asdict(settings))}"
