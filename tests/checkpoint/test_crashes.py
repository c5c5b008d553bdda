"""Kills at every event of the file system leave the old files or the new ones, and the same command works again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import logits, wrapped
from crashes import every_kill
from transformers import AutoModelForCausalLM

from routed_peft.checkpoint import inspect_checkpoint, load_routed, save_routed
from routed_peft.checkpoint.export import ablate, export
from routed_peft.files import in_use


def all_logits(path: Path, regions: list[str]) -> torch.Tensor:
    return logits(load_routed(path, regions))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "before", ["nothing", pytest.param("two regions", marks=SLOW), pytest.param("one region", marks=SLOW)]
)
def test_a_save_leaves_the_old_run_or_the_new_one(before: str, tmp_path: Path) -> None:
    path, kept = tmp_path / "run", tmp_path / "kept"
    names = {"two regions": ("forget", "bio"), "one region": ("forget",), "nothing": ()}[before]
    if names:
        save_routed(wrapped("mlp", names=names, seed=5), kept, train_base=True)
    new = wrapped("mlp", names=("forget",))
    expected = {"new": logits(new)} | ({"old": all_logits(kept, list(names))} if names else {})
    seen = set()

    def prepare() -> Callable[[], Any]:
        shutil.rmtree(path, ignore_errors=True)
        if names:
            shutil.copytree(kept, path)
        return lambda: save_routed(new, path, train_base=True)

    for save in every_kill(prepare):
        left = [item for item in path.glob(".*/forget") if item.is_dir()]
        decided = list(path.glob(".routed_peft-*.json"))
        if left and not decided and names:
            assert any(str(left[0].parent) in problem for problem in inspect_checkpoint(path)["problems"])
        state = "nothing"
        if (path / "routing.json").is_file() or decided:
            regions = list(names) if not decided and names and (path / "bio").is_dir() else ["forget"]
            found = all_logits(path, regions)
            state = next(name for name, value in expected.items() if torch.equal(found, value))
        seen.add(state)
        save()
        assert torch.equal(all_logits(path, ["forget"]), expected["new"])
        assert inspect_checkpoint(path)["problems"] == []
        assert not [item for item in path.iterdir() if item.name.startswith(".") or item.name == "bio"]
        assert [item for item in tmp_path.iterdir() if item not in (path, kept)] == []
    assert seen == {"new", "old" if names else "nothing"}


@SLOW
@pytest.mark.parametrize("command", [ablate, lambda src, out: export(src, out, keep=["forget"])])
def test_an_export_appears_whole_or_can_be_repeated(command: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = logits(AutoModelForCausalLM.from_pretrained(command(run, tmp_path / "whole")))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}

    def prepare() -> Callable[[], Any]:
        shutil.rmtree(out, ignore_errors=True)
        return lambda: command(run, out)

    for again in every_kill(prepare):
        assert not in_use(out)
        again()
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
        assert inspect_checkpoint(out)["problems"] == []
        assert not [item for item in out.iterdir() if item.name.startswith(".")]
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
