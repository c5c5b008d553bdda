"""Commands that were killed: whatever the moment, the same command goes on to the same results, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_parts import call
from crashes import restore, spread, states_of_kills
from evaluation_parts import byte_tokenizer, tiny_llama, write_jsonl
from safetensors.torch import load_file

from routed_peft.files import read_json
from routed_peft.training import RunDirectory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and text of both sides."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, words in {"train": "a cell wall", "forget": "the cell", "retain": "eleven cats"}.items():
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{words} {i} {words} {name}"} for i in range(6)])
    return folder


def succeeds(*arguments: object) -> None:
    result = call(*arguments)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"


def points(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in p.items() if "runtime" not in k and "per_second" not in k} for p in RunDirectory(out).points()
    ]


def record(file: Path) -> dict[str, Any]:
    return {name: value for name, value in read_json(file).items() if name != "time"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--topk", "4", "--batch-size", "2"], ["--retain", "{retain}", "--eval-steps", "1"]])
def test_undo_that_is_killed_anywhere_goes_on_to_the_same_student(
    source: Path, tmp_path: Path, more: list[str]
) -> None:
    root = tmp_path / "root"
    out = root / "out"
    flags = [flag.format(retain=source / "retain.jsonl") for flag in more]
    text = ["--text", source / "train.jsonl", "--text", source / "forget.jsonl"]
    command = ["undo", source / "model", out, *text, "--length", 8, "--steps", 2, "--cpu", *flags]
    root.mkdir()

    def found() -> tuple[Any, ...]:
        return (
            record(out / "undo.json"),
            record(out / "summary.json"),
            points(out),
            sorted(p.name for p in out.iterdir()),
        )

    states = states_of_kills(lambda: succeeds(*command), root, tmp_path / "states")
    expected, weights = found(), load_file(out / "model.safetensors")
    for state in spread(states, 24):
        restore(state, root)
        if (out / "summary.json").is_file():
            assert "holds a finished run" in call(*command).stderr
        else:
            succeeds(*command)
        assert found() == expected
        student = load_file(out / "model.safetensors")
        assert all(torch.equal(student[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_relearning_that_is_killed_anywhere_goes_on_to_the_same_numbers(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    out = root / "out"
    files = [part for side in ("forget-train", "forget-test", "retain-test") for part in
             (f"--{side}", source / f"{'train' if side == 'forget-train' else side.split('-')[0]}.jsonl")]  # fmt: skip
    command = ["relearn", source / "model", *files, "--out", out, "--attack", "forget", "--attack", "lora+few-shot-2"]
    command += ["--attack", "int8", "--seeds", 2, "--steps", "0,1,2", "--learning-rate", "1e-3,1e30", "--extensions", 1]
    command += ["--length", 16]
    root.mkdir()
    states = states_of_kills(lambda: succeeds(*command), root, tmp_path / "states")
    expected = record(out / "summary.json"), points(out)
    assert any(None in point.values() for point in expected[1]), "one of the rates diverges"
    for state in [*spread(states, 16), root]:
        if state != root:
            restore(state, root)
        succeeds(*command)
        assert (record(out / "summary.json"), points(out)) == expected
        assert not [left for left in out.iterdir() if left.name.startswith(".")]
        assert json.loads((out / "run.json").read_text())["config"]["steps"] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("eval_steps", [1, 2])
def test_undo_that_diverges_leaves_no_weights_and_does_not_block_the_corrected_command(
    source: Path, tmp_path: Path, eval_steps: int
) -> None:
    out = tmp_path / "out"
    command = ["undo", source / "model", out, "--text", source / "train.jsonl", "--length", 8, "--steps", 2, "--cpu"]
    command += ["--eval-steps", eval_steps, "--topk", 4]
    wrong = call(*command, "--learning-rate", "1e30")
    lines = [line for line in wrong.stderr.splitlines() if line.startswith("routed-peft: ")]
    assert wrong.exit_code == 1 and len(lines) == 1 and "Lower the learning rate" in lines[0], wrong.output
    assert "Traceback" not in wrong.output and "unexpected " not in wrong.output
    assert not [file for file in out.rglob("*.safetensors") if file.parent.name != "teacher"]
    succeeds(*command, "--learning-rate", "1e-3")
    assert record(out / "undo.json")["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in load_file(out / "model.safetensors").values())
