"""Models that bring code of their own: commands and recipes run it when they are asked to, and refuse it in one line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from cli_parts import call
from evaluation_parts import write_jsonl
from peft import get_peft_model
from places import ROOT
from remote_code import with_own_code
from transformers import AutoModelForCausalLM

from routed_peft import RoutedConfig, save_routed

FILES = {
    "forget": "a cell wall and a gene of the plant",
    "test": "leaves and roots in the soil of a field",
    "retain": "tables and chairs of another house",
}


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the code go into a directory of the test; whoever asks a person fails."""
    place = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_own_code(tmp_path_factory.mktemp("own") / "plain")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    return {side: write_jsonl(folder / f"{side}.jsonl", [{"text": f"{text} {i}"} for i in range(12)])
            for side, text in FILES.items()}  # fmt: skip


def saved(plain: Path, out: Path, train_base: bool) -> Path:
    model = AutoModelForCausalLM.from_pretrained(plain, trust_remote_code=True)
    config = RoutedConfig(size=2, init="model", target_modules=["mlp"], task_type="CAUSAL_LM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain, trust_remote_code=True)
    return save_routed(get_peft_model(model, config, "forget"), out, train_base=train_base, tokenizer=tokenizer)


def refused(result: Any) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 1 and not result.stdout, result.output
    assert "brings code of its own" in lines[-1] and "`--trust-remote-code`" in lines[-1]
    assert not [line for line in lines[:-1] if "Traceback" in line or "routed-peft" in line]


@pytest.mark.slow
@pytest.mark.parametrize("train_base", [True, False])
def test_ablate_and_inspect(plain: Path, tmp_path: Path, train_base: bool) -> None:
    run = saved(plain, tmp_path / "run", train_base)
    assert call("inspect", run).exit_code == 0
    refused(call("ablate", run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    for keep in ([], ["--keep", "forget"]):
        out = tmp_path / f"out{len(keep)}"
        result = call("ablate", run, out, "--trust-remote-code", *keep)
        assert result.exit_code == 0, result.output
        assert (out / "modeling_strange.py").is_file() and call("inspect", out).exit_code == 0
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "run"])
@pytest.mark.parametrize("command", ["evaluate", "relearn", "undo"])
def test_measuring_and_unlearning(plain: Path, texts: dict[str, str], tmp_path: Path, kind: str, command: str) -> None:
    pytest.importorskip("lm_eval")
    src, forget, retain = plain, texts["forget"], texts["retain"]
    if kind == "run":
        src = saved(plain, tmp_path / "run", True)
    more: dict[str, list[Any]] = {
        "evaluate": [src, "--tasks", "routed_forget_loss", "--forget-file", forget, "--limit", 2],
        "relearn": [
            src, "--forget-train", forget, "--forget-test", texts["test"], "--retain-test", retain, "--out", tmp_path / "out",
            "--seeds", 1, "--steps", "0,1", "--learning-rate", "1e-3", "--extensions", 0, "--length", 16,
        ],
        "undo": [src, tmp_path / "out", "--text", retain, "--cpu", "--steps", 1, "--length", 16],
    }  # fmt: skip
    refused(call(command, *more[command]))
    assert not (tmp_path / "out" / "summary.json").exists()
    result = call(command, *more[command], "--trust-remote-code")
    assert result.exit_code == 0, result.output
    if command == "undo":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


RECIPES: dict[str, list[str]] = {
    "pretrain": ["--size", "2", "--target_modules", "mlp", "--self_labels", "false", "--train_base", "true"],
    "finetune": ["--rank", "2"],
    "unlearn": ["--method", "graddiff"],
    "undo": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(
    plain: Path, texts: dict[str, str], tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files = ["--forget_file", texts["forget"], "--retain_file", texts["retain"]]
    files = ["--text_files", texts["retain"]] if recipe == "undo" else files
    script = ROOT / "recipes" / f"{recipe}.py"
    arguments = [
        str(script), "--model_name_or_path", str(plain), *files, *RECIPES[recipe], "--output_dir", str(tmp_path / "out"),
        "--length", "16", "--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu", "true",
        "--report_to", "none", "--save_strategy", "no",
    ]  # fmt: skip
    for trust in (False, True):
        monkeypatch.setattr(sys, "argv", [*arguments, *(["--trust_remote_code", "true"] if trust else [])])
        if trust:
            runpy.run_path(str(script), run_name="__main__")
            continue
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        told = capsys.readouterr()
        assert told.err.strip().splitlines()[-1].startswith(f"{recipe}.py: ") and "trust_remote_code" in told.err
        assert "[y/N]" not in told.out and "Traceback" not in told.err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())
    result = tmp_path / ("out-ablated" if recipe in ("pretrain", "finetune") else "out")
    AutoModelForCausalLM.from_pretrained(result, trust_remote_code=True)
