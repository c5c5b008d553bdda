"""`RunDirectory`: files of a run, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from routed_peft.training import RunDirectory


def test_a_run_has_its_three_files(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.start({"method": "sgtm", "path": Path("x"), "betas": (0.9, 0.95)}, seeds={"seed": 3}, command=["a b", "c"])
    run.log(split="train", step=1, loss=torch.tensor(2.0))
    run.log(split="train", step=2, loss=math.inf)
    run.finish({"loss": float("nan")})
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["config"] == {"method": "sgtm", "path": "x", "betas": [0.9, 0.95]}
    assert (about["seeds"], about["command"]) == ({"seed": 3}, "'a b' c")
    assert {"python", "torch", "routed_peft", "datasets"} <= set(about["versions"])
    assert about["hardware"]["cores"] == os.cpu_count()
    assert run.points() == [
        {"split": "train", "step": 1, "loss": 2.0},
        {"split": "train", "step": 2, "loss": None},
    ]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"loss": None}
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.jsonl", "run.json", "summary.json"]


def test_a_finished_run_is_not_overwritten(tmp_path):
    run = RunDirectory(tmp_path)
    run.start({}, {})
    run.log(step=1)
    run.start({}, {})
    assert run.points() == [], "an unfinished run begins anew"
    run.log(step=1)
    run.finish({})
    with pytest.raises(ValueError, match="holds a finished run"):
        run.start({}, {})
    assert run.points() == [{"step": 1}]
    run.start({}, {}, resume=True)
    assert run.points() == [{"step": 1}]


def test_a_line_cut_short_is_left_out_and_mended(tmp_path):
    run = RunDirectory(tmp_path)
    run.log(step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.points() == [{"step": 1}]
    run.log(step=2)
    assert run.points() == [{"step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    run.log(step=2)
    assert run.points() == [{"step": 2}], "it may be the first line, too"


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.finish({"a": 1})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        run.finish({"a": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
