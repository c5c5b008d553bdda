"""Former names: they work, and warn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from checkpoint_parts import wrapped

from routed_peft import data, monitoring, presets, unlearning
from routed_peft.checkpoint import push_to_hub, save_routed
from routed_peft.checkpoint.export import export
from routed_peft.deprecation import formerly_positional
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
    save, write, push = (cast(Any, function) for function in (save_routed, export, push_to_hub))
    routes = presets.sgtm("forget")
    with pytest.warns(DeprecationWarning, match="save_routed takes .* by name now: write routes=") as caught:
        run = save(wrapped("mlp", names=("forget",)), tmp_path / "run", routes, train_base=True)
    assert {warning.filename for warning in caught if "by name now" in str(warning.message)} == {__file__}
    assert json.loads((run / "routing.json").read_text())["routes"] == routes_to_dict(routes)
    with pytest.warns(DeprecationWarning, match="export takes .* by name now: write keep="):
        out = write(run, tmp_path / "out", ["forget"])
    assert json.loads((out / "ablation.json").read_text())["regions_kept"] == ["forget"]
    named = pytest.warns(DeprecationWarning, match="push_to_hub .* write regions_repo=")
    with named, pytest.raises(ValueError, match="access is per repository"):
        push(run, "org/model", "org/model")


def test_a_function_with_arguments_that_were_positional() -> None:
    @formerly_positional("c", "d")
    def total(a: int, b: int, *, c: int, d: int = 0) -> int:
        return a + b + c + d

    with pytest.warns(DeprecationWarning, match="total takes .* by name now: write c=, d=") as caught:
        assert total(1, 2, 3, 4) == 10  # type: ignore[call-arg, misc]
    assert caught[0].filename == __file__ and total(1, 2, c=3) == 6
    for wrong in ({"args": (1, 2, 3), "c": 3}, {"args": (1, 2, 3, 4, 5)}):
        with pytest.raises(TypeError, match="positional arguments"):
            total(*wrong.pop("args"), **wrong)  # type: ignore[arg-type, misc, attr-defined]


def test_treated() -> None:
    with pytest.warns(DeprecationWarning, match="monitoring.treated is now called apply_quarantine"):
        assert monitoring.treated is monitoring.apply_quarantine
