"""Former names: they work, and warn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_parts import wrapped

from routed_peft import data, presets, unlearning
from routed_peft.checkpoint import push_to_hub, save_routed
from routed_peft.checkpoint.export import export
from routed_peft.evaluation import relearning
from routed_peft.evaluation.relearning.data import AttackData
from routed_peft.routes import routes_to_dict


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


def test_rows_of_an_arm() -> None:
    with pytest.warns(DeprecationWarning, match="routed_peft.data.of_arm is now called select_arm"):
        assert data.of_arm is data.select_arm


def test_arguments_that_were_positional(tmp_path: Path) -> None:
    routes = presets.sgtm("forget")
    with pytest.warns(DeprecationWarning, match="save_routed takes .* by name now: write routes=") as caught:
        run = save_routed(wrapped("mlp", names=("forget",)), tmp_path / "run", routes, train_base=True)
    assert caught[0].filename == __file__
    assert json.loads((run / "routing.json").read_text())["routes"] == routes_to_dict(routes)
    with pytest.warns(DeprecationWarning, match="export takes .* by name now: write keep="):
        out = export(run, tmp_path / "out", ["forget"])
    assert json.loads((out / "ablation.json").read_text())["regions_kept"] == ["forget"]
    with (
        pytest.warns(DeprecationWarning, match="push_to_hub .* write regions_repo="),
        pytest.raises(ValueError, match="access"),
    ):
        push_to_hub(run, "org/model", "org/model")
