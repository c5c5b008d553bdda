"""`RunDirectory`: files of a run, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from routed_peft.files import write_json
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


def test_an_ablated_model_may_not_lie_in_the_run_nor_the_run_in_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for target in (tmp_path / "run", tmp_path / "run/deep/out", tmp_path):
        with pytest.raises(ValueError, match="lie in each other"):
            run.ablation_target(str(target))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        run.ablation_target(str(tmp_path / "file/out"))


def test_an_ablated_model_of_the_interrupted_run_itself_makes_way(tmp_path: Path) -> None:
    run, target, other = RunDirectory(tmp_path / "run"), tmp_path / "run-ablated", tmp_path / "mine.txt"
    other.write_text("mine")
    files = {"model.safetensors": "0", "../mine.txt": "0"}

    def write(source: Path) -> None:
        write_json(target / "ablation.json", {"source": str(source), "sha256": files})
        (target / "model.safetensors").write_text("weights")

    write(tmp_path / "run")
    assert run.ablation_target() == target and not list(target.iterdir()) and other.read_text() == "mine"
    write(tmp_path / "another")
    with pytest.raises(ValueError, match="is not empty"):
        run.ablation_target()
    write(tmp_path / "run")
    run.finish({})
    with pytest.raises(ValueError, match="is not empty"):
        run.ablation_target()


def test_tokens_are_not_written_down(tmp_path: Path) -> None:
    secret, run = "hf_" + "a1B2" * 8, RunDirectory(tmp_path)
    given = [
        "train.py",
        "--hub_token",
        "s3cret",
        "--token=s3cret",
        f"HF_TOKEN={secret}",
        f"https://u:{secret}@hub",
        "--seed",
        "1",
    ]
    run.start({}, {}, command=[*given, "--eos_token", "<eos>"])
    text = (tmp_path / "run.json").read_text()
    assert "s3cret" not in text and secret not in text and "--seed 1" in text and "<eos>" in text
