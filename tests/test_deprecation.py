"""Former names: they work, and warn."""

from __future__ import annotations

import pytest

from routed_peft import unlearning
from routed_peft.evaluation import relearning
from routed_peft.evaluation.relearning.data import AttackData


@pytest.mark.parametrize(("old", "new"), [("spent", "read_cost"), ("save_undone", "save_student")])
def test_renamed_functions_of_unlearning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"unlearning.{old} is now called {new}") as caught:
        assert getattr(unlearning, old) is getattr(unlearning, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unlearning.nothing  # noqa: B018


def test_summarise() -> None:
    with pytest.warns(DeprecationWarning, match="relearning.summarise is now called summarize"):
        assert relearning.summarise is relearning.summarize


def test_attack_data_apart() -> None:
    texts = {"forget_train": ["a cell", "a gene"], "forget_test": ["a gene"], "retain_test": ["a cat"]}
    with pytest.warns(DeprecationWarning, match="without_overlap") as caught:
        assert AttackData.apart(**texts).forget_train == ["a cell"]
    assert caught[0].filename == __file__
