"""`TrainingCost`: the formula, and costs as plain data."""

from __future__ import annotations

import pytest
from families import tiny

from routed_peft.runs.cost import TrainingCost, matmul_parameters


def test_operations_of_a_student_and_of_its_teacher() -> None:
    assert TrainingCost.from_counts(7, 10, steps=2).flops == 6 * 7 * 10
    distilled = TrainingCost.from_counts(7, 10, steps=2, teacher_tokens=10)
    assert distilled == TrainingCost(flops=8 * 7 * 10, serial_steps=2, tokens=10)
    larger = TrainingCost.from_counts(
        7, 10, steps=2, teacher_tokens=10, teacher_parameters=100, labeled_forget_tokens=3
    )
    assert larger + distilled == TrainingCost(6 * 70 + 2 * 1000 + 8 * 70, 4, 20, 3)


def test_plain_data_comes_back_and_other_data_is_refused() -> None:
    cost = TrainingCost(1, 2, 3, 4)
    assert TrainingCost.from_dict(cost.to_dict()) == cost
    for wrong in ({}, cost.to_dict() | {"hours": 1}):
        with pytest.raises(ValueError, match="a cost has the entries"):
            TrainingCost.from_dict(wrong)


@pytest.mark.parametrize(("tied", "tables"), [(True, 0), (False, 1)])
def test_a_table_counts_if_it_is_the_head_too(tied: bool, tables: int) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    table = model.get_input_embeddings().weight.numel()
    assert matmul_parameters(model) == sum(p.numel() for p in model.parameters()) - tables * table
