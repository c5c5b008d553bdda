"""Settings of the experiment: its arms, labels and seeds, and how the model is taught."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from experiments.common.arms import check_chosen
from experiments.style.arms import ARMS, LABELS


@dataclass
class Experiment:
    """Arms, labels and seeds of a run, and the place of its results."""

    output_dir: str = field(default="runs/style", metadata={"help": "Where cells and the summary go."})
    summary_file: str | None = field(default=None, metadata={"help": "A second place for the numbers of all cells."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Of {', '.join(ARMS)}."})
    labels: list[str] = field(default_factory=lambda: list(LABELS), metadata={"help": f"Of {', '.join(LABELS)}."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of weights, labels, rows and samples."})
    split: str = field(
        default="test", metadata={"help": "Held-out text: validation to choose settings by, test for the numbers."}
    )

    def __post_init__(self) -> None:
        check_chosen(self.seeds, arms=(self.arms, ARMS), labels=(self.labels, LABELS))
        if self.split not in ("validation", "test"):
            raise ValueError(f'`split` is "validation" or "test", got {self.split!r}')


@dataclass
class Settings:
    """Everything that a cell depends on beside its arm, its labels and its seed."""

    vocab_size: int = field(default=2048, metadata={"help": "Entries of the tokenizer."})
    hidden_size: int = field(
        default=128, metadata={"help": "Width of the model; its MLPs have three times as many units."}
    )
    layers: int = field(default=2, metadata={"help": "Decoder layers."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    start_documents: int = field(default=24000, metadata={"help": "Glosses that the start model is trained on."})
    start_steps: int = field(default=600, metadata={"help": "Steps of that, 16 rows of 128 tokens each."})
    start_learning_rate: float = field(default=3e-3, metadata={"help": "Peak rate of that; cosine."})
    documents: int = field(default=12000, metadata={"help": "Other glosses, for fine-tuning."})
    style_share: float = field(default=0.1, metadata={"help": "Share of them in the style."})
    steps: int = field(default=250, metadata={"help": "Steps of fine-tuning."})
    batch_size: int = field(default=32, metadata={"help": "Rows a step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak rate of both adapters; cosine."})
    rank: int = field(default=8, metadata={"help": "Of both LoRA adapters; their scale is 2."})
    labeled_first: float = field(
        default=0.15,
        metadata={"help": "Share of a routed run that takes labeled rows only, half of them of the style."},
    )
    evaluate_every: int = field(default=50, metadata={"help": "Steps between looks for the best checkpoint."})
    held_out: int = field(default=400, metadata={"help": "Held-out glosses of each template, for losses and samples."})
    sample_tokens: int = field(default=16, metadata={"help": "Tokens of a sample."})

    def __post_init__(self) -> None:
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
