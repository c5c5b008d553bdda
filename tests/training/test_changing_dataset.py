from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from training_parts import assert_same, rows, train, weights
from transformers import TrainerCallback

from routed_peft.training import ChangingDataset


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
    saved = [json.loads((tmp_path / f"a/checkpoint-{step}/routing.json").read_text())["extra"] for step in (1, 2)]
    assert saved == [{"turned": False}, {"turned": True}]
    ds = Reversed(rows())
    resumed = train(tmp_path / "b", tokenizer, dataset=ds, resume=str(tmp_path / "a/checkpoint-3"), **options)
    assert ds.turned and ds.forward_tokens == 0
    assert_same(weights(trainer.model), weights(resumed.model))
