"""Rows of two alphabets for runs with self-labels, whose region tells one from the other after a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from training_parts import model_of

from routed_peft import RoutedConfig
from routed_peft.training import SelfLabelConfig, SelfLabeledRows

TOPICS = ["bio", "cyber"]


def two_alphabets(tokens: int = 8) -> Dataset:
    """Forget rows in one alphabet, retain rows in another; a quarter carries no label."""
    letters = {"forget": (3, 9), "retain": (120, 126)}
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(160):
        side = ("forget", "retain")[i % 2]
        ids = torch.randint(*letters[side], (tokens,), generator=generator).tolist()
        data.append({"input_ids": ids, "route_label": "unlabeled" if i >= 120 else side, "side": side})
    return Dataset.from_list(data)


def self_labeled(rows: Dataset | None = None, first_forget_share: float = 0.25, **options: Any) -> SelfLabeledRows:
    """A start of ten steps, too short to learn much from a tenth of its rows."""
    start: dict[str, Any] = {"labeled_first": 0.5, "first_forget_share": first_forget_share}
    weights = options.pop("token_weights", None)
    config = SelfLabelConfig(forget_share=0.25, **start, **options)
    return SelfLabeledRows(rows or two_alphabets(), 160, config=config, token_weights=weights)


def swapped(rows: Dataset, numbers: Sequence[int]) -> Dataset:
    """The same rows with wrong labels at some numbers."""
    other = {"forget": "retain", "retain": "forget"}
    return rows.map(
        lambda row, i: {"route_label": other[row["side"]] if i in numbers else row["route_label"]}, with_indices=True
    )


SELF_LABELING = dict(
    train_sampling_strategy="sequential", per_device_train_batch_size=8, max_steps=20, learning_rate=5e-2,
    lr_scheduler_type="constant", self_check=False,
)  # fmt: skip


def three_alphabets() -> Dataset:
    """Rows of two regions and of the core, each in an alphabet of its own; a quarter carries no label."""
    letters = {"bio": (3, 9), "cyber": (60, 66), "retain": (120, 126)}
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(240):
        side = list(letters)[i % 3]
        ids = torch.randint(*letters[side], (8,), generator=generator).tolist()
        data.append({"input_ids": ids, "route_label": "unlabeled" if i >= 180 else side, "side": side})
    return Dataset.from_list(data)


def self_labeled_topics() -> SelfLabeledRows:
    """The rows of three alphabets, half of the run before the scoring."""
    config = SelfLabelConfig(labeled_first=0.5, first_forget_share=0.5, forget_share=0.4)
    return SelfLabeledRows(three_alphabets(), 160, config=config, regions=TOPICS)


def topics_model() -> nn.Module:
    """A model with a region for each of the topics."""
    part: dict[str, Any] = {"size": 4, "init": "model", "task_type": "CAUSAL_LM"}
    return model_of(adapters={name: RoutedConfig(**part) for name in TOPICS})
