"""Settings of the experiment: its arms, labels and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.common.arms import check_chosen
from experiments.common.toy_model import check_size
from experiments.style.arms import ARMS, LABELS
from routed_peft.mistakes import check_numbers, option


@dataclass
class Experiment:
    """Arms, labels and seeds of a run, and the place of its results."""

    output_dir: str = option("runs/style", "Where cells and the summary go.")
    summary_file: str | None = option(None, "A second place for the numbers of all cells.")
    arms: list[str] = option(list(ARMS), f"Of {', '.join(ARMS)}.")
    labels: list[str] = option(list(LABELS), f"Of {', '.join(LABELS)}.")
    seeds: list[int] = option([0], "Of weights, labels, rows and samples.")
    split: str = option("test", "Held-out text: validation to choose settings by, test for the numbers.")

    def __post_init__(self) -> None:
        check_chosen(self.seeds, arms=(self.arms, ARMS), labels=(self.labels, LABELS))
        if self.split not in ("validation", "test"):
            raise ValueError(f'`split` is "validation" or "test", got {self.split!r}')


@dataclass
class Settings:
    """Everything that a cell depends on beside its arm, its labels and its seed."""

    vocab_size: int = option(2048, "Entries of the tokenizer.")
    hidden_size: int = option(128, "Width of the model; its MLPs have three times as many units.")
    layers: int = option(2, "Decoder layers.")
    heads: int = option(4, "Attention heads.")
    start_documents: int = option(24000, "Glosses that the start model is trained on.")
    start_steps: int = option(600, "Steps of that, 16 rows of 128 tokens each.")
    start_learning_rate: float = option(3e-3, "Peak rate of that; cosine.")
    documents: int = option(12000, "Other glosses, for fine-tuning.")
    style_share: float = option(0.1, "Share of them in the style.")
    steps: int = option(250, "Steps of fine-tuning.")
    batch_size: int = option(32, "Rows a step.")
    learning_rate: float = option(2e-3, "Peak rate of both adapters; cosine.")
    rank: int = option(8, "Of both LoRA adapters; their scale is 2.")
    labeled_first: float = option(0.15, "Share of a routed run that takes labeled rows only, half of them of the "
        "style.")  # fmt: skip
    evaluate_every: int = option(50, "Steps between looks for the best checkpoint.")
    held_out: int = option(400, "Held-out glosses of each template, for losses and samples.")
    sample_tokens: int = option(16, "Tokens of a sample.")

    def __post_init__(self) -> None:
        check_size(self)
        check_numbers(self, "start_documents", "start_steps", "documents", "steps", "batch_size", "rank", low=1)
        check_numbers(self, "evaluate_every", "held_out", "sample_tokens", "vocab_size", low=1)
        check_numbers(self, "start_learning_rate", "learning_rate")
        check_numbers(self, "labeled_first", high=1)
        if not 0 < self.style_share < 1:
            raise ValueError(f"`style_share` is a share between 0 and 1, got {self.style_share}: try 0.1")

    def start(self) -> dict[str, Any]:
        """Return what the start model depends on."""
        names = (
            "vocab_size",
            "hidden_size",
            "layers",
            "heads",
            "start_documents",
            "start_steps",
            "start_learning_rate",
        )
        return {name: getattr(self, name) for name in names}
