"""Settings and arms of a run: those of the demo, and what only experiments vary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from routed_peft.demo.settings import ARMS, Arm, DemoSettings
from routed_peft.mistakes import check_numbers


@dataclass(frozen=True)
class Settings(DemoSettings):
    """`DemoSettings`, with wrong labels, mixed rows and other ways to route."""

    recall: float = 1.0  # share of the labeled forget documents that are labeled forget (`simulate_labels`)
    precision: float = 1.0  # share of the documents labeled forget that are
    self_labels: bool = True  # the region labels the unlabeled rows (`SelfLabeledRows`)
    # Gradient weight of forget rows on the base. A little above 0 lets them teach it what both sides share, at the price of a
    # little of what they do not.
    base_weight: float = 0.0
    # Forget rows teach the base as far as their tokens are as common in retain text (`token_frequency_weights`), and at
    # `base_weight` otherwise; with self-labels only.
    frequency_weights: bool = False
    # Rows mix the sides of documents that have the same label, or none. By default they do not, as a page of a longer text does
    # not: then the truth has sorted unlabeled text into rows.
    mixed_rows: bool = False
    by_document: bool = False  # the region is asked about documents and not about rows; with `mixed_rows`
    region_learning_rate: float | None = None  # peak learning rate of the region; None for `learning_rate`

    def __post_init__(self) -> None:
        if self.self_labels:
            super().__post_init__()
        else:
            self.check_bounds()

    def check_bounds(self) -> None:
        """Raise ValueError where a number is out of range."""
        super().check_bounds()
        check_numbers(self, "recall", "precision", high=1)
        check_numbers(self, "base_weight", low=-math.inf)
        check_numbers(self, "region_learning_rate")


@dataclass(frozen=True)
class MethodArm(Arm):
    """A way to train."""

    era: bool = False  # routed as published for ERA (arXiv 2410.04332): masks at activations, by token frequency
    # either side has an expert of its own, in place of most of the MLP (`routed_peft.presets.demix`)
    demix: bool = False


DEMO_ARMS = {arm.key: MethodArm(**vars(arm)) for arm in ARMS}
"""The demo's arms by their keys."""
