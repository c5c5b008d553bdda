from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import tiny
from peft import get_peft_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from routed_peft import RoutedConfig, RoutedTrainer, RoutedTrainingArguments, presets
from routed_peft.data import train_tokenizer
from routed_peft.training import RunDirectory, RunRecorder


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


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"loss": 1.0, "learning_rate": 0.1}, {"split": "train", "ablated": False, "loss": 1.0, "learning_rate": 0.1}),
        ({"eval_loss": 1.0}, {"split": "eval", "ablated": False, "loss": 1.0}),
        ({"eval_ablated_loss": 1.0}, {"split": "eval", "ablated": True, "loss": 1.0}),
        ({"eval_retain_loss": 1.0, "eval_retain_runtime": 2.0},
         {"split": "retain", "ablated": False, "loss": 1.0, "runtime": 2.0}),
        ({"eval_ablated_far_off_loss": 1.0}, {"split": "far_off", "ablated": True, "loss": 1.0}),
    ],
)  # fmt: skip
def test_a_log_becomes_a_point(tmp_path, logs, expected):
    recorder = RunRecorder(RunDirectory(tmp_path), method="sgtm")
    arguments, state = TrainingArguments(), TrainerState(global_step=7, is_world_process_zero=True)
    recorder.on_log(arguments, state, TrainerControl(), logs)
    assert recorder.run.points() == [{"method": "sgtm", "step": 7, **expected}]


def test_only_the_first_process_writes(tmp_path):
    recorder = RunRecorder(RunDirectory(tmp_path))
    state = TrainerState(global_step=7, is_world_process_zero=False)
    recorder.on_log(TrainingArguments(), state, TrainerControl(), {"loss": 1.0})
    assert not recorder.run.points()


def train(out: Path, steps: int, resume: bool = False) -> list[dict]:
    """Six rows a side, evaluated and saved every second step; the points that are left."""
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama", vocab_size=300), RoutedConfig(size=4, init="model"), adapter_name="forget")
    ids = torch.randint(3, 250, (12, 8), generator=torch.Generator().manual_seed(0)).tolist()
    ds = Dataset.from_dict({"input_ids": ids, "route_label": ["forget", "retain"] * 6})
    arguments = RoutedTrainingArguments(
        str(out), train_base=True, max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_steps=2,
        eval_strategy="steps", eval_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        include_num_input_tokens_seen="all",
    )  # fmt: skip
    trainer = RoutedTrainer(
        model,
        arguments,
        routes=presets.sgtm(),
        train_dataset=ds,
        eval_dataset={"forget": ds.select(range(4)), "retain": ds.select(range(4, 8))},
        processing_class=train_tokenizer(["a"], vocab_size=258),
        callbacks=[RunRecorder(RunDirectory(out), arm="routed")],
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    return RunDirectory(out).points()


def test_a_trainer_records_its_run_and_a_resumed_one_repeats_nothing(tmp_path):
    points = train(tmp_path, 4)
    series = {(p["split"], p["ablated"]): [(q["step"], q["tokens"]) for q in points if q["split"] == p["split"]
              and q["ablated"] == p["ablated"]] for p in points}  # fmt: skip
    assert series[("train", False)] == [(1, 32), (2, 64), (3, 96), (4, 128)]
    for split in ("forget", "retain"):
        for ablated in (False, True):
            assert series[(split, ablated)] == [(2, 64), (4, 128)]
    assert all(p["arm"] == "routed" and p["loss"] > 0 for p in points)
    again = train(tmp_path, 4, resume=True)
    key = lambda p: (p["split"], p["ablated"], p["step"], p["loss"])
    assert sorted(map(key, again)) == sorted(map(key, points))
