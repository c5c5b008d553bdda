"""Recipes that were killed: whatever the moment, the same command goes on to the same results, to the bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from crashes import restore, spread, states_of_kills
from evaluation_parts import write_jsonl
from recipe_parts import run_here
from safetensors.torch import load_file
from training_parts import assert_same

from routed_peft.checkpoint import inspect_checkpoint
from routed_peft.training import RunDirectory

WORDS = {"forget": ["cell", "gene", "virus", "enzyme"], "retain": ["table", "chair", "river", "music"]}


def results(root: Path) -> dict[str, Any]:
    """All that a finished run is about, but times."""
    summary = json.loads((root / "out/summary.json").read_text())
    losses = {key: value for key, value in summary.items() if not key.startswith("seconds")}
    points = [{k: v for k, v in p.items() if "per_second" not in k and "runtime" not in k} for p in
              RunDirectory(root / "out").points()]  # fmt: skip
    return {"summary": losses, "points": points}


def weights(root: Path) -> dict[str, Any]:
    files = ("out/model.safetensors", "out/forget/adapter_model.safetensors", "out-ablated/model.safetensors")
    return {f"{file}: {name}": value for file in files for name, value in load_file(root / file).items()}


@pytest.mark.slow
def test_pretraining_that_is_killed_anywhere_goes_on_to_the_same_run(tmp_path: Path) -> None:
    rng, root = random.Random(0), tmp_path / "root"
    documents = [
        {"text": " ".join(rng.choice([*WORDS[side], "the", "of"]) for _ in range(12)), "side": side}
        for _ in range(30) for side in WORDS
    ]  # fmt: skip
    held = [
        f"{side}={write_jsonl(tmp_path / f'{side}.jsonl', [{'text': ' '.join(WORDS[side]) + f' {i}'} for i in range(3)])}"
        for side in WORDS
    ]
    command = [
        "recipes/pretrain.py",
        "--train_file",
        write_jsonl(tmp_path / "train.jsonl", documents),
        "--eval_files",
        *held,
    ]
    command += ["--hidden_size", "8", "--intermediate_size", "8", "--num_hidden_layers", "1", "--vocab_size", "270"]
    command += [
        "--num_attention_heads",
        "2",
        "--size",
        "4",
        "--length",
        "8",
        "--max_steps",
        "2",
        "--self_labels",
        "false",
    ]
    command += [
        "--learning_rate",
        "0.01",
        "--per_device_train_batch_size",
        "4",
        "--logging_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    command += ["--save_total_limit", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--disable_tqdm", "true"]
    command += ["--train_base", "true", "--report_to", "none", "--use_cpu", "true", "--resume_from_checkpoint", "auto"]
    command += ["--output_dir", str(root / "out")]
    root.mkdir()
    states = states_of_kills(lambda: run_here(command), root, tmp_path / "states")
    expected, tensors = results(root), weights(root)
    for state in spread(states, 24):
        restore(state, root)
        if (root / "out/summary.json").is_file():
            with pytest.raises(ValueError, match="is not empty|holds a finished run"):
                run_here(command)
        else:
            run_here(command)
        assert results(root) == expected
        assert_same(weights(root), tensors)
        assert not inspect_checkpoint(root / "out")["problems"]
