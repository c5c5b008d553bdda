from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from families import tiny
from peft import get_peft_model
from places import ROOT
from recipe_parts import run_here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from routed_peft import RoutedConfig, export, presets, save_routed
from routed_peft.cli import app
from routed_peft.data import pack, train_tokenizer
from routed_peft.runs.cost import TrainingCost
from routed_peft.training import RunDirectory
from routed_peft.unlearning import METHODS, DistillationTrainer, read_cost

CONFIGS = {
    file.stem: file for name in ("unlearn_*", "undo") for file in (ROOT / "recipes/configs").glob(f"{name}.yaml")
}
WORDS = {"forget": ["cell", "gene", "virus", "enzyme"], "retain": ["table", "chair", "river", "music"]}
SHORT = ["--max_steps", "4", "--warmup_steps", "1", "--logging_steps", "2", "--length", "16", "--disable_tqdm", "true"]


def documents(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"text": " ".join(rng.choice([*WORDS[side], "the", "of"]) for _ in range(12)), "side": side}
        for _ in range(count)
        for side in WORDS
    ]


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a plain checkpoint that knows both sides, a routed run of the same tokenizer, and text."""
    folder = tmp_path_factory.mktemp("recipes")
    train, held = documents(100, 0), documents(20, 1)
    tokenizer = train_tokenizer([row["text"] for row in train], vocab_size=300)
    model = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=3)
    rows = pack(Dataset.from_list(train), tokenizer, length=16, by=[])
    ids = torch.tensor(rows["input_ids"][:])[:128]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    routed = get_peft_model(model, RoutedConfig(size=3, init="model"), adapter_name="forget")
    save_routed(routed, folder / "routed", routes=presets.sgtm("forget"), tokenizer=tokenizer, train_base=True)
    write(folder / "train.jsonl", train)
    for side in WORDS:
        write(folder / f"{side}.jsonl", [row for row in held if row["side"] == side])
    return folder


def files(place: Path, name: str) -> list[str]:
    sides = [f"{side}={place}/{side}.jsonl" for side in WORDS]
    return [name, f"{place}/train.jsonl", "--eval_files", *sides]


def unlearn(place: Path, out: Path, config: str, *more: str) -> dict[str, Any]:
    command = ["recipes/unlearn.py", "--config", str(CONFIGS[config]), "--output_dir", str(out), *SHORT]
    run_here([*command, "--model_name_or_path", str(place / "plain"), *files(place, "--train_file"), *more])
    return json.loads((out / "unlearning.json").read_text())


def same(one: Path, other: Path) -> bool:
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (one, other)]
    return all(bool((a == b).all()) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_there_is_a_config_for_every_method():
    assert set(CONFIGS) == {*(f"unlearn_{method}" for method in METHODS), "undo"}
    for name, file in CONFIGS.items():
        settings = yaml.safe_load(file.read_text())
        assert settings["output_dir"] == f"runs/{name}"
        assert f"unlearn_{settings.get('method', '')}" == name or name == "undo"


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_plain_checkpoint_and_its_records(place, tmp_path, method):
    out = tmp_path / "out"
    summary = unlearn(place, out, f"unlearn_{method}", "--labeled", "0.5", "--learning_rate", "0.01")
    assert not same(place / "plain", out) and len(AutoTokenizer.from_pretrained(out)) <= 300
    assert summary["losses"]["forget"] > summary["losses_before"]["forget"] + (0.0 if method == "rmu" else 0.1)
    ledger = TrainingCost.from_dict(summary["ledger"])
    assert ledger.serial_steps == 4 and ledger.tokens == 4 * 8 * 16 * (1 if method == "gradient_ascent" else 2)
    run = RunDirectory(out)
    assert json.loads((out / "summary.json").read_text()) == summary
    points = run.points()
    assert [point["step"] for point in points if point["split"] == "train"] == [2, 4]
    measured = {point["split"]: point["loss"] for point in points if point["split"] != "train"}
    assert measured == pytest.approx(summary["losses"], rel=1e-5), "once, at the end"
    with pytest.raises(ValueError, match="holds a finished run"):
        unlearn(place, out, f"unlearn_{method}")


@pytest.mark.slow
def test_undo_after_unlearning(place, tmp_path):
    """What a checkpoint has cost is added up over all stages, where it is known."""
    assert unlearn(place, tmp_path / "of_unknown_cost", "unlearn_maxent")["total_ledger"] is None
    pretraining = TrainingCost(flops=7, serial_steps=5, tokens=30, labeled_forget_tokens=10)
    known = shutil.copytree(place / "plain", tmp_path / "known")
    (known / "summary.json").write_text(json.dumps({"ledger": pretraining.to_dict()}))
    source = ["--forget_rows", "2", "--model_name_or_path", str(known)]
    before = unlearn(place, tmp_path / "teacher", "unlearn_maxent", *source)
    assert before["ledger"]["labeled_forget_tokens"] == 2 * 16
    assert TrainingCost.from_dict(before["total_ledger"]) == pretraining + TrainingCost.from_dict(before["ledger"])
    command = ["recipes/undo.py", "--config", str(CONFIGS["undo"]), *SHORT, *files(place, "--text_files")]
    command += ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(tmp_path / "teacher")]
    command += ["--eval_steps", "2", "--topk", "8", "--tolerance", "0"]
    run_here(command)
    content = json.loads((tmp_path / "out/undo.json").read_text())
    assert (content["alpha"], content["beta"], content["steps"], content["stopped"]) == (0.6, 0.1, 4, False)
    assert content["teacher_ledger"] == before["total_ledger"]
    assert TrainingCost.from_dict(content["total_ledger"]).labeled_forget_tokens == 10 + 2 * 16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    splits = {(point["split"], point["step"]) for point in RunDirectory(tmp_path / "out").points()}
    assert splits >= {("retain", 2), ("forget", 4)}
    other = train_tokenizer(["entirely other words"], vocab_size=270)
    tiny("llama", vocab_size=300).save_pretrained(tmp_path / "student")
    other.save_pretrained(tmp_path / "student")
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "again")
    with pytest.raises(ValueError, match="different tokenizers"):
        run_here([*command, "--student", str(tmp_path / "student")])


@pytest.mark.slow
def test_what_an_ablated_model_has_cost_is_what_its_run_has(place, tmp_path):
    cost = TrainingCost(flops=7, serial_steps=5, tokens=30)
    run = shutil.copytree(place / "routed", tmp_path / "run")
    (run / "summary.json").write_text(json.dumps({"ledger": cost.to_dict()}))
    export(run, tmp_path / "whole", keep=["forget"])
    assert read_cost(tmp_path / "whole") == cost
    shutil.rmtree(run)
    assert read_cost(tmp_path / "whole") is None


@pytest.mark.slow
def test_the_command_cleans_up_after_itself_alone(place, tmp_path):
    """Stored outputs go, files of the user's are left alone, and an unknown cost is said to be unknown."""
    more = ["--text", str(place / "train.jsonl"), "--steps", "2", "--length", "16", "--cpu", "--eval-steps", "1"]
    out = tmp_path / "stored"
    result = CliRunner().invoke(app, ["undo", str(place / "plain"), str(out), *more, "--topk", "4"])
    assert result.exit_code == 0, result.output
    assert "own cost, which is not recorded" in " ".join(result.output.replace("│", " ").split())
    assert json.loads((out / "undo.json").read_text())["total_ledger"] is None
    assert not (out / "teacher").exists() and not list(out.glob("checkpoint-*"))
    shutil.copytree(place / "plain", tmp_path / "theirs/checkpoint-9")
    result = CliRunner().invoke(app, ["undo", str(place / "plain"), str(tmp_path / "theirs"), *more])
    assert result.exit_code == 1 and "holds files but no run to continue" in result.stderr
    assert (tmp_path / "theirs/checkpoint-9/model.safetensors").is_file()
    result = CliRunner().invoke(app, ["undo", str(place / "plain"), str(place / "plain"), *more])
    assert result.exit_code == 1 and "is the source of the model" in " ".join(result.stderr.split())


def test_mistakes_are_explained(place, tmp_path):
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        run_here(["recipes/unlearn.py", "--config", str(CONFIGS["unlearn_npo"]), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        run_here(["recipes/undo.py", "--config", str(CONFIGS["undo"]), "--output_dir", str(tmp_path)])
    kept = write(tmp_path / "kept.jsonl", [{"text": "a chair", "route_label": "retain"}])
    with pytest.raises(ValueError, match=r"no document is labeled forget; the labels are \['retain'\]"):
        unlearn(place, tmp_path / "none", "unlearn_npo", "--train_file", kept)
    with pytest.raises(ValueError, match="holds files but no run to continue"):
        unlearn(place, tmp_path, "unlearn_npo", "--train_file", kept)
    before = (place / "plain/model.safetensors").read_bytes()
    for name in ("unlearn_npo", "undo"):
        source = ["--model_name_or_path", str(place / "plain"), "--output_dir", str(place / "plain")]
        with pytest.raises(ValueError, match="is the source of the model and would be overwritten"):
            run_here([f"recipes/{name.partition('_')[0]}.py", "--config", str(CONFIGS[name]), *source])
    assert (place / "plain/model.safetensors").read_bytes() == before
    own = ["--train_file", str(place / "train.jsonl"), "--eval_strategy", "steps", "--length", "16"]
    command = ["recipes/unlearn.py", "--config", str(CONFIGS["unlearn_npo"]), *own]
    command += ["--model_name_or_path", str(place / "plain"), "--output_dir", str(tmp_path / "unseen")]
    with pytest.raises(ValueError, match="there is no held-out text: name `eval_files`"):
        run_here(command)


def test_undo_says_that_it_has_nothing_to_stop_by(place, tmp_path):
    command = ["recipes/undo.py", "--config", str(CONFIGS["undo"]), *SHORT, "--text_files", str(place / "train.jsonl")]
    command += ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(place / "plain")]
    with pytest.raises(ValueError, match="`eval_files` has retian but no retain=FILE, whose loss ends training"):
        run_here([*command, "--eval_files", f"retian={place / 'train.jsonl'}"])
    with pytest.raises(ValueError, match="rows of `eval_files` are also in `text_files`, which is trained on"):
        run_here([*command, "--eval_files", f"retain={place / 'train.jsonl'}"])


def test_a_run_that_resumes_is_told_the_same(place, tmp_path):
    command = ["recipes/undo.py", "--config", str(CONFIGS["undo"]), *SHORT, *files(place, "--text_files")]
    command += ["--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(place / "plain")]
    RunDirectory(tmp_path / "out").start({"training": {"alpha": 0.1}}, {})
    (tmp_path / "out/checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="other settings: `alpha` is 0.1 there, got 0.6"):
        run_here([*command, "--resume_from_checkpoint", str(tmp_path / "out/checkpoint-2")])


# The command


def call(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def undo(place: Path, src: str, out: Path, *more: object) -> Any:
    text = ["--text", place / "train.jsonl", "--length", 16, "--batch-size", 4, "--cpu"]
    return call("undo", place / src, out, *text, *more)


@pytest.mark.slow
def test_the_command_makes_a_plain_student_of_a_routed_run(place, tmp_path):
    result = undo(place, "routed", tmp_path / "out", "--alpha", 0.3, "--beta", 0, "--steps", 4, "--eval-steps", 2,
                  "--retain", place / "retain.jsonl")  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "out/undo.json").read_text())
    assert (content["alpha"], content["beta"], content["max_steps"]) == (0.3, 0.0, 4)
    for word in ("retain loss", "FLOPs", str(tmp_path / "out")):
        assert word in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 24 and not [
        name for name, _ in model.named_parameters() if "routed" in name
    ]
    assert not list((tmp_path / "out").glob("checkpoint-*")), "it is finished"
    again = undo(place, "routed", tmp_path / "out", "--steps", 4)
    assert again.exit_code == 1 and "holds a finished run" in again.stderr


@pytest.mark.slow
def test_the_command_continues_where_it_was_killed(place, tmp_path, monkeypatch):
    settings = ["--alpha", 0.5, "--steps", 6, "--eval-steps", 2]
    assert undo(place, "plain", tmp_path / "whole", *settings).exit_code == 0
    step, steps = DistillationTrainer.training_step, []

    def killed(self: DistillationTrainer, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", killed)
        assert undo(place, "plain", tmp_path / "killed", *settings).exit_code != 0
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    other = undo(place, "plain", tmp_path / "killed", *settings, "--alpha", 0.7)
    assert other.exit_code == 1 and "other settings: `alpha` is 0.5 there, got 0.7" in other.stderr
    torn = shutil.copytree(tmp_path / "killed/checkpoint-2", tmp_path / "killed/checkpoint-4")
    (torn / "trainer_state.json").write_text("")  # killed again, while it saved
    teacher = place / "plain/model.safetensors"
    kept = teacher.read_bytes()
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place / "plain")).save_pretrained(place / "plain")
    changed = undo(place, "plain", tmp_path / "killed", *settings)
    teacher.write_bytes(kept)
    assert changed.exit_code == 1 and "other settings: `content`" in changed.stderr, "another teacher by the same name"
    result = undo(place, "plain", tmp_path / "killed", *settings)
    assert result.exit_code == 0, result.output
    assert same(tmp_path / "whole", tmp_path / "killed")
    logged = [[point["step"] for point in RunDirectory(tmp_path / name).points()] for name in ("whole", "killed")]
    assert logged[0] == logged[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", 1.5], "`alpha` must be between 0 and 1"),
        (["--beta", -1], "`beta` must be between 0 and 1"),
        (["--text", "nowhere.jsonl"], "there is no file"),
        (["--text", "{folder}"], "is a directory: name each of its files"),
        (["--length", 4096], "the model reads 64 at once"),
        (["--retain", "{folder}/train.jsonl"], "rows of `--retain` are also in `--text`, which is trained on"),
    ],
)
def test_the_commands_mistakes_are_one_line(place, tmp_path, more, message):
    result = undo(place, "plain", tmp_path / "out", *[str(one).format(folder=place) for one in more])
    lines = [line for line in result.stderr.splitlines() if line.startswith("routed-peft:")]
    assert result.exit_code == 1 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_command_explains_itself():
    result = call("undo", "--help")
    assert result.exit_code == 0 and "Example" in result.output
