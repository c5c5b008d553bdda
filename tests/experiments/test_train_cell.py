"""The cost of a cell of the removal experiment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from self_label_parts import self_labeled
from training_parts import model_of

from experiments.removal import train_cell
from routed_peft.runs.cost import TrainingCost, matmul_parameters


def cost(monkeypatch, run: Any, *, drop: str | None = None, labels: bool = True) -> tuple[TrainingCost, list[str]]:
    """Return the cost of a cell with rows of 8 tokens, 4 a step, and the arm whose labels were counted."""
    asked: list[str] = []
    counted = lambda documents, tokenizer, *, length, arm: asked.append(arm) or 24
    monkeypatch.setattr(train_cell, "labeled_tokens", counted)
    cell: Any = SimpleNamespace(
        settings=SimpleNamespace(length=8, batch_size=4),
        method=SimpleNamespace(arm=SimpleNamespace(drop=drop), labels=labels),
    )
    material: Any = SimpleNamespace(documents=None, tokenizer=None)
    return train_cell.cost_of(cell, model_of(), material=material, run=run), asked


def test_scoring_by_the_region_costs_two_forward_passes(monkeypatch):
    size, run = matmul_parameters(model_of()), self_labeled()
    start, _ = cost(monkeypatch, run)
    assert start == TrainingCost(6 * size * 160 * 8, 40, 160 * 8, 24)
    run.apply_scoring({"step": 1, "start": 88, "rows": [120, 121], "is_forget": [True, False], "tokens": 1000})
    scored, _ = cost(monkeypatch, run)
    assert scored == TrainingCost(6 * size * 160 * 8 + 2 * size * 2 * 1000, 40, 160 * 8, 24)


@pytest.mark.parametrize(
    ("method", "arm"), [({"drop": "side"}, "perfect_filter"), ({}, "filter"), ({"labels": False}, "none")]
)
def test_labels_are_those_that_the_method_was_given(monkeypatch, method, arm):
    assert cost(monkeypatch, Dataset.from_dict({"input_ids": [[0] * 8] * 8}), **method)[1] == [arm]
