"""`RunRecorder`: points of a training, also one that resumes."""

from __future__ import annotations

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
