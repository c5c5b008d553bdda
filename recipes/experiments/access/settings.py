"""Settings of the experiment: topics, arms and seeds, and how models are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.access.arms import ARMS
from experiments.common.arms import check_chosen
from routed_peft.corpora import PAIRS
from routed_peft.mistakes import check_numbers, option


@dataclass
class Experiment:
    """Arms and seeds of a run, and the place of its results."""

    output_dir: str = option("runs/access", "Where cells and the summary go.")
    summary_file: str | None = option(None, "A second place for the numbers of all cells.")
    arms: list[str] = option(list(ARMS), f"Of {', '.join(ARMS)}.")
    seeds: list[int] = option([1], "Of weights, rows and draws.")
    split: str = option("test", "Held-out text: validation to choose settings by, test for the numbers.")

    def __post_init__(self) -> None:
        check_chosen(self.seeds, arms=(self.arms, ARMS))
        if self.split not in ("validation", "test"):
            raise ValueError(f'`split` is "validation" or "test", got {self.split!r}')


@dataclass
class Settings:
    """Everything that a cell depends on beside its arm and its seed."""

    topics: list[str] = option(
        ["biology", "spanish"], "Pairs whose forget sides are topics; their retain sides are the core."
    )
    share: float = option(0.125, "Share of each topic in the rows that everything sees.")
    steps: int = option(400, "Steps of a run on everything; filters take fewer, in proportion to their rows.")
    batch_size: int = option(16, "Rows a step.")
    length: int = option(128, "Tokens a row.")
    vocab_size: int = option(2048, "Entries of the tokenizer.")
    tokenizer_documents: int = option(8000, "Documents of each text that the tokenizer is trained on.")
    layers: int = option(4, "Decoder layers.")
    hidden_size: int = option(128, "Width of the model; its MLPs have three times as many units.")
    heads: int = option(4, "Attention heads.")
    region: dict[str, Any] = field(
        default_factory=lambda: {"size": 64, "r": 16, "lora_alpha": 16, "embeddings": "full"},
        metadata={"help": "Parts of a region, fields of `RoutedConfig`."},
    )
    learning_rate: float = option(3e-3, "Peak rate of the base; cosine.")
    rate: float = option(4.0, "Rate of regions as a multiple of it, in routed runs and branches.")
    consistency: float = option(3.0, "Weight of the consistency pass.")
    branch_core: float = option(0.5, "Rows of the core for each of the topic in a branch, read with the region on.")
    held_out: int = option(64, "Rows of each text, for the losses.")

    def __post_init__(self) -> None:
        check_chosen([0], topics=(self.topics, PAIRS))
        check_numbers(self, "steps", "batch_size", "length", "vocab_size", "layers", "hidden_size", "heads", low=1)
        if len(set(self.topics)) < len(self.topics) or not 0 < self.share * len(self.topics) < 1:
            raise ValueError(
                f"`topics` are different ones with shares below 1 together, got {self.topics} at {self.share}"
            )

    def start(self) -> dict[str, Any]:
        """Return what the tokenizer depends on."""
        return {name: getattr(self, name) for name in ("topics", "vocab_size", "tokenizer_documents")}
