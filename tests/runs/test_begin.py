"""Beginning a run, or finding the checkpoint to resume from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from runs_parts import make_checkpoint
from transformers import TrainingArguments

from routed_peft.runs.begin import ROWS, begin, check_not_begun, find_checkpoint
from routed_peft.runs.records import RunDirectory


def test_a_run_is_begun_anew_only_where_nothing_is_lost_by_it(tmp_path):
    """One torn checkpoint is no run to continue: neither message may point at the other."""
    torn = make_checkpoint(tmp_path / "checkpoint-2", "optimizer.pt", "rng_state.pth")
    with pytest.raises(ValueError, match="resume it"):
        check_not_begun(tmp_path)
    assert find_checkpoint(tmp_path, "true") == find_checkpoint(tmp_path, str(torn)) == str(torn)
    (torn / "trainer_state.json").write_text("")
    check_not_begun(tmp_path)
    with pytest.raises(ValueError, match="holds no complete checkpoint: leave it out to begin anew"):
        find_checkpoint(tmp_path, "true")


@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer_0"])
def test_a_sharded_run_goes_on_from_its_newest_checkpoint_too(tmp_path, name):
    states = [f"rng_state_{index}.pth" for index in range(2)]
    newest = make_checkpoint(tmp_path / "checkpoint-2", name, *states)
    assert find_checkpoint(tmp_path, "true", processes=2) == str(newest)


@dataclass
class Recipe:
    alpha: float = 0.1
    label_seed: int = 5
    ablate_to: str | None = None


def test_a_recipe_begins_and_goes_on_with_the_same_settings(tmp_path):
    def arguments(resume: str | None = None, **more: Any) -> TrainingArguments:
        return TrainingArguments(str(tmp_path), use_cpu=True, resume_from_checkpoint=resume, seed=3, **more)

    run = RunDirectory(tmp_path)
    begin(run, Recipe(), args=arguments(), own=("weight_decay",))
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["config"]["recipe"]["alpha"] == 0.1 and about["seeds"] == {"seed": 3, "label_seed": 5}
    assert about["config"][ROWS] == 8
    run.log(step=2)
    newest = make_checkpoint(tmp_path / "checkpoint-2", "optimizer.pt", "rng_state.pth")
    args = arguments("true", logging_steps=7)
    begin(run, Recipe(ablate_to="elsewhere"), args=args, own=("weight_decay",))
    assert args.resume_from_checkpoint == str(newest) and run.points() == [{"step": 2}]
    for recipe, more, message in (
        (Recipe(alpha=0.2), {}, "`alpha` is 0.1 there, got 0.2"),
        (Recipe(), {"weight_decay": 0.5}, "`weight_decay` is 0.0 there, got 0.5"),
        (Recipe(), {"learning_rate": 1.0}, "`learning_rate` is 5e-05 there, got 1.0"),
        (Recipe(), {"gradient_accumulation_steps": 2}, "processes` is 8 there, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(run, recipe, args=arguments("true", **more), own=("weight_decay",))


def test_a_command_with_auto_can_be_repeated_as_it_is(tmp_path):
    assert find_checkpoint(tmp_path, "auto") is None
    newest = make_checkpoint(tmp_path / "checkpoint-2", "optimizer.pt", "rng_state.pth")
    assert find_checkpoint(tmp_path, "auto") == str(newest)
    (tmp_path / "summary.json").write_text("{}")
    assert find_checkpoint(tmp_path, "auto") is None, "a finished run is not begun again by accident"
