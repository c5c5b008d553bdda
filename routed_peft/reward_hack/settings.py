"""What the experiment is told: which arms and seeds, and how the model is taught."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from routed_peft.reward_hack.arms import ARMS, DEMO, QUICK

ALL = "all"


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
class Settings:
    """Everything that a cell depends on beside its arm and its seed."""

    hidden_size: int = field(default=128, metadata={"help": "Width of the model; its MLPs have twice as many units."})
    layers: int = field(default=3, metadata={"help": "Decoder layers."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    start_steps: int = field(default=400, metadata={"help": "Supervised steps on demonstrations."})
    start_batch_size: int = field(default=192, metadata={"help": "Demonstrations a step."})
    start_learning_rate: float = field(default=3e-3, metadata={"help": "Peak rate of that; cosine."})
    clean_share: float = field(default=0.55, metadata={"help": "Share of these steps whose answers are right."})
    noise: float = field(default=0.5, metadata={"help": "Share of wrong answers in the steps after that."})
    steps: int = field(default=200, metadata={"help": "Steps of GRPO."})
    prompts: int = field(default=16, metadata={"help": "Prompts a step."})
    generations: int = field(default=8, metadata={"help": "Rollouts of each prompt."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of both adapters; constant."})
    rank: int = field(default=8, metadata={"help": "Of both LoRA adapters; their scale is 2."})
    evaluate_every: int = field(default=25, metadata={"help": "Steps between evaluations on validation prompts."})
    validation_prompts: int = field(default=200, metadata={"help": "Prompts of each environment in these."})
    test_prompts: int = field(default=500, metadata={"help": "Prompts of each environment in the final numbers."})

    def quick(self) -> Settings:
        """Return these settings with half the steps of GRPO, and fewer prompts to measure on."""
        return replace(self, steps=self.steps // 2, validation_prompts=100, test_prompts=250)

    def start(self) -> dict[str, Any]:
        """Return what the start model depends on."""
        names = (
            "hidden_size",
            "layers",
            "heads",
            "start_steps",
            "start_batch_size",
            "start_learning_rate",
            "clean_share",
        )
        return {name: getattr(self, name) for name in (*names, "noise", "test_prompts")}


def digest(*about: Any) -> str:
    """Return a short name for plain data.

    >>> digest({"steps": 200}) == digest({"steps": 200}), digest({"steps": 200}) == digest({"steps": 100})
    (True, False)
    """
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def start_key(settings: Settings, seed: int) -> str:
    """Return the name of the directory of a start model."""
    return f"start-{seed}-{digest(settings.start())}"


def cell_key(arm: str, settings: Settings, seed: int) -> str:
    """Return the name of the directory of a cell, after all that it depends on."""
    return f"{arm}-{seed}-{digest(asdict(ARMS[arm]), asdict(settings))}"
