from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from training_parts import assert_same, rows, train, weights
from transformers import TrainerCallback

from routed_peft.training import ChangingDataset
from routed_peft.training.changing_dataset import STATE, read_state, write_state


class Reversed(ChangingDataset):
    """Rows that come from the other end once step 2 is over."""

    def __init__(self, rows: Dataset) -> None:
        self.rows, self.turned = rows, False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[-1 - index if self.turned else index]

    def callback(self, trainer: Any) -> TrainerCallback:
        ds = self

        class Turn(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                ds.turned = ds.turned or state.global_step == 2

        return Turn()

    def state(self) -> dict[str, Any]:
        return {"turned": self.turned}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.turned = state.get("turned", False)


def test_a_dataset_of_ones_own_changes_under_way_and_resumes(tmp_path, tokenizer):
    options = dict(train_sampling_strategy="sequential", save_strategy="steps", save_steps=1, max_steps=5)
    trainer = train(tmp_path / "a", tokenizer, dataset=Reversed(rows()), **options)
    saved = [read_state(tmp_path / f"a/checkpoint-{step}") for step in (1, 2)]
    assert saved == [{"turned": False}, {"turned": True}]
    ds = Reversed(rows())
    resumed = train(tmp_path / "b", tokenizer, dataset=ds, resume=str(tmp_path / "a/checkpoint-3"), **options)
    assert ds.turned and ds.forward_tokens == 0
    assert_same(weights(trainer.model), weights(resumed.model))


def test_the_state_is_compact_and_its_loss_is_noticed(tmp_path, tokenizer):
    options = dict(train_sampling_strategy="sequential", save_strategy="steps", save_steps=3, max_steps=5)
    train(tmp_path / "a", tokenizer, dataset=Reversed(rows()), **options)
    assert "turned" not in (tmp_path / "a/checkpoint-3/routing.json").read_text()
    file = tmp_path / "a/checkpoint-3" / STATE
    whole = file.read_bytes()
    for content in (whole[:40], b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match="is missing or damaged"):
            train(tmp_path / "b", tokenizer, dataset=Reversed(rows()), resume=str(file.parent), **options)
    count = 850_000
    found = {"rows": np.random.default_rng(0).permutation(count).tolist(), "is_forget": [True, False] * (count // 2)}
    write_state(tmp_path, {"self_labels": [found]})
    assert read_state(tmp_path) == {"self_labels": [found]} and (tmp_path / STATE).stat().st_size < 4e6
