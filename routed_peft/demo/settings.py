"""Settings of the demo: four arms, and the numbers that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from routed_peft.mistakes import check_numbers
from routed_peft.training.self_label_config import SelfLabelConfig, setting


@dataclass(frozen=True)
class DemoSettings(SelfLabelConfig):
    """Settings of the demo, the same for every arm; those of `SelfLabelConfig` matter to the routed arm alone."""

    pair: str = "biology"  # forget and retain text, a key of `routed_peft.corpora.PAIRS`
    steps: int = 500
    batch_size: int = 16
    length: int = 128
    documents: int | None = None  # training documents of each side; None for all
    vocab_size: int = 2048
    layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    heads: int = 4
    region_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    labeled: float = 0.5  # share of the documents of each side that carry a label
    robust_share: float = setting("robust_share", 0.05)
    seed: int = 0
    evaluations: int = 10  # how often the validation losses are taken during training
    validation_rows: int = 32  # packed rows per side for that
    limit: int = 200  # documents per side and questions per task, in the final measurements
    relearn_documents: int = 16  # forget documents that the attacker has
    relearn_steps: tuple[int, ...] = (0, 5, 10, 20)  # measured there; the last one ends the attack
    relearn_learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)  # all are tried, and the worst case counts
    relearn_limit: int = 100  # test documents for that

    def __post_init__(self) -> None:
        self.check_bounds()
        super().__post_init__()

    def check_bounds(self) -> None:
        """Raise ValueError where a number is out of range."""
        check_numbers(self, "steps", "batch_size", "documents", "vocab_size", "layers", "hidden_size", low=1)
        check_numbers(self, "intermediate_size", "heads", "region_size", "evaluations", "validation_rows", low=1)
        check_numbers(self, "limit", "relearn_documents", "relearn_limit", low=1)
        check_numbers(self, "length", low=2)
        check_numbers(self, "learning_rate", "warmup_steps", "weight_decay", "seed")
        check_numbers(self, "labeled", "forget_share", "first_forget_share", high=1)
        check_numbers(self, "labeled_first", "score_again_at", "robust_share", low=-math.inf)
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"`hidden_size` must be even in every head, got {self.hidden_size} for {self.heads} `heads`: "
                             f"make it a multiple of {2 * self.heads}")  # fmt: skip

    @classmethod
    def quick(cls) -> DemoSettings:
        """Return the settings of ``--quick``: fewer documents, tokens and questions, the same model and attack.

        >>> DemoSettings.quick().steps < DemoSettings().steps
        True
        """
        fewer = cls(
            steps=160, batch_size=8, documents=8000, warmup_steps=20, evaluations=4, validation_rows=16, limit=50
        )
        return replace(fewer, relearn_steps=(0, 5, 20), relearn_learning_rates=(3e-4, 1e-3), relearn_limit=30)

    @property
    def tokens(self) -> int:
        """Training tokens per arm."""
        return self.steps * self.batch_size * self.length


@dataclass(frozen=True)
class Arm:
    """A way to train."""

    key: str  # name of its directory, and in files
    name: str  # for readers
    about: str  # its treatment of forget data
    drop: str | None = None  # column in which the value "forget" keeps a row out of training
    routed: bool = False  # gradients are routed; otherwise the region's units are ordinary parameters

    @property
    def plain(self) -> str:
        """Name of the directory of its plain checkpoint."""
        return "ablated" if self.routed else "plain"


ARMS = (
    Arm("no_routing", "no routing", "trains on everything, and removes nothing"),
    Arm("filter", "filter, same labels", "leaves out what is labeled forget", drop="route_label"),
    Arm("routed", "routed", "sends what is labeled forget to the region, then ablates the region", routed=True),
    Arm("perfect_filter", "perfect filter", "leaves out all true forget data: the ideal, out of reach", drop="side"),
)
"""The arms, in the order in which they are trained and shown."""
