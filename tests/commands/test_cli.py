from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_parts import byte_tokenizer, tiny_llama, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from routed_peft import Route, RoutedConfig, presets, save_routed
from routed_peft.cli import app
from routed_peft.commands import COMMANDS


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A saved run with the regions `forget` and `bio`."""
    path = tmp_path_factory.mktemp("cli") / "run"
    model = get_peft_model(tiny_llama(), RoutedConfig(size=3, init="model"), adapter_name="forget")
    model.add_adapter("bio", RoutedConfig(size=4, init="model"))
    routes = {**presets.sgtm("forget"), "bio": Route(weights={"base": 0.5})}
    return save_routed(
        model, path, routes=routes, tokenizer=byte_tokenizer(), train_base=True, tokens_per_route={"forget": 12000}
    )


def call(*arguments: object):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def test_inspect_shows_regions_and_routes(run):
    result = call("inspect", run)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any("trained base" in line for line in lines)
    assert any("forget 12,000" in line for line in lines)
    bio = next(line for line in lines if "│ bio " in line and "ROUTED" in line)
    assert [cell.strip() for cell in bio.strip("│").split("│")][3:5] == ["4", "384"]  # 2 layers x 3 x 4 x 16
    assert any("base 0.5" in line for line in lines) and any("all 1" in line for line in lines)


def test_inspect_as_json_and_of_a_single_region(run):
    assert [entry["name"] for entry in json.loads(call("inspect", run, "--json").stdout)["regions"]] == [
        "forget",
        "bio",
    ]
    result = call("inspect", run / "bio")
    assert result.exit_code == 0 and "ROUTED" in result.output and "384" in result.output


def test_inspect_fails_where_a_file_is_missing(run, tmp_path):
    damaged = tmp_path / "run"
    for file in run.rglob("*"):
        if file.is_file() and file.relative_to(run).as_posix() != "bio/adapter_model.safetensors":
            copy = damaged / file.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    result = call("inspect", damaged)
    assert result.exit_code == 1
    assert "problem:" in result.stderr and "bio" in result.stderr


def test_ablate_writes_a_plain_checkpoint(run, tmp_path):
    result = call("ablate", run, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "forget, bio" in result.output and str(tmp_path / "out") in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in model.named_parameters() if "routed" in name]
    inspected = call("inspect", tmp_path / "out")
    assert inspected.exit_code == 0 and "plain checkpoint" in inspected.output


def test_ablate_keeps_a_region_on_request(run, tmp_path):
    result = call("ablate", run, tmp_path / "out", "--keep", "bio")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out/ablation.json").read_text())
    assert (record["regions_removed"], record["regions_kept"]) == (["forget"], ["bio"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./no-such-run"], "'./no-such-run' is no directory"),
        (["ablate", "RUN", "RUN"], "is the source itself"),
        (["ablate", "RUN", "OUT", "--keep", "boi"], "'boi'"),
        (["evaluate", "RUN", "--regions", "boi"], "boi"),
        (["evaluate", "RUN", "--metadata", "pair"], "KEY=VALUE"),
        (["evaluate", "RUN", "--metadata", "limit=few"], "`limit` must be a whole number from 1, got 'few'"),
        (["evaluate", "RUN", "--tasks", "routed_retain_mc", "--metadata", "limit=0"], "`limit` must be a whole number"),
        (["inspect", "no-such-org/no-such-model"], "routed-peft: 'no-such-org/no-such-model' is no directory here, so"),
        (["evaluate", "RUN/bio"], "is an adapter without its model: give its run"),
    ],
)
def test_a_users_mistake_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"RUN": str(run), "RUN/bio": str(run / "bio"), "OUT": str(tmp_path / "out")}
    result = call(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("routed-peft:")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_lets_the_error_through(run):
    result = call("--debug", "ablate", run, run)
    assert isinstance(result.exception, ValueError)


def test_a_wrong_option_is_a_usage_error(run):
    assert call("ablate", run).exit_code == 2
    assert call("evaluate", run, "--batch-size", 0).exit_code == 2


def test_evaluate_measures_every_set_of_regions(run, tmp_path):
    torch.manual_seed(0)
    forget = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}, {"text": "a gene"}])
    retain = write_jsonl(tmp_path / "retain.jsonl", [{"text": "a cat"}])
    out = tmp_path / "results/out.json"
    files = ["--forget-file", forget, "--retain-file", retain, "--out", out, "--batch-size", 2]
    result = call("evaluate", run, "--tasks", "routed_forget_loss,routed_retain_loss", "--regions", "bio", *files)
    assert result.exit_code == 0, result.output
    for word in ("routed_forget_loss", "all regions", "ablated", "bio", str(out)):
        assert word in result.output
    report = json.loads(out.read_text())
    assert list(report["results"]) == ["all regions", "ablated", "bio"]
    scores = [report["results"][name]["routed_forget_loss/token_ce"] for name in report["results"]]
    assert len(set(scores)) == 3, "three different models were measured"
    assert report["metadata"]["forget_file"] == forget


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"pair": "spanish", "arm": "none"}, "forget and retain losses: held-out text of the pair spanish"),
        ({"pair": "spanish", "train_file": "my.jsonl"}, "pair biology, which this model may not have been trained on"),
    ],
)
def test_losses_are_those_of_the_pair_that_a_run_was_trained_on(run, tmp_path, recipe, said):
    own = shutil.copytree(run, tmp_path / "run")
    (own / "run.json").write_text(json.dumps({"config": {"recipe": recipe}}))
    more = ["--tasks", "routed_forget_loss", "--limit", 2, "--out", tmp_path / "out.json"]
    result = call("evaluate", own, *more)
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.output.split())
    assert json.loads((tmp_path / "out.json").read_text())["metadata"]["pair"] == said.split("pair ")[1].split(",")[0]
    assert call("ablate", own, tmp_path / "ablated").exit_code == 0
    told = call("evaluate", tmp_path / "ablated", *more).output
    assert said in " ".join(told.split()), "an ablated model knows its run"


def test_ablating_a_model_that_was_trained_without_routing_is_remarked_on(run, tmp_path):
    own = shutil.copytree(run, tmp_path / "run")
    routing = json.loads((own / "routing.json").read_text())
    note = "forget belongs to"
    for kept, keep, said in ([], [], False), (["forget"], [], True), (["forget"], ["--keep", "forget"], False):
        (own / "routing.json").write_text(json.dumps({**routing, "kept_regions": kept}))
        result = call("ablate", own, tmp_path / f"{len(kept)}{len(keep)}", *keep)
        assert result.exit_code == 0, result.output
        assert (note in result.stderr) == said


def test_a_lora_that_names_its_base_is_measured_as_it_always_was(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    byte_tokenizer().save_pretrained(tmp_path / "lora")
    text = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}])
    result = call("evaluate", tmp_path / "lora", "--tasks", "routed_forget_loss", "--forget-file", text)
    assert result.exit_code == 0, result.output


def test_metadata_that_no_task_reads_is_a_mistake_and_the_place_for_results_is_tried_first(run, tmp_path):
    result = CliRunner().invoke(app, ["evaluate", str(run), "--metadata", "pari=spanish"])
    assert result.exit_code == 1 and "has 'pari', which no task reads" in result.stderr
    result = CliRunner().invoke(app, ["evaluate", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 1 and "is a directory: name a file in it" in result.stderr


def test_a_limit_in_the_metadata_is_a_number_of_rows(run, tmp_path):
    forget = write_jsonl(tmp_path / "forget.jsonl", [{"text": "cell wall"}, {"text": "a gene"}])
    losses = []
    for more in ([], ["--metadata", "limit=1"], ["--limit", 1]):
        out = tmp_path / "out.json"
        command = ["evaluate", run, "--tasks", "routed_forget_loss", "--forget-file", forget, "--out", out, *more]
        result = call(*command)
        assert result.exit_code == 0, result.output
        losses.append(json.loads(out.read_text())["results"]["ablated"]["routed_forget_loss/token_ce"])
    assert losses[0] != losses[1] == losses[2]


def test_tasks_path_holds_the_tasks():
    result = call("tasks-path")
    assert (Path(result.output.strip()) / "routed_forget_loss.yaml").is_file()


COMMAND_NAMES = [command.__name__.replace("_", "-") for command in COMMANDS]


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output


def test_help_and_inspection_import_nothing_heavy(run):
    """One process answers `--help` of every command, `tasks-path` and `inspect`, and then names what it has imported."""
    lines = [["--help"], *([name, "--help"] for name in COMMAND_NAMES), ["tasks-path"], ["inspect", str(run)]]
    code = f"""
import sys
from routed_peft.cli import app
for line in {lines}:
    app(line, standalone_mode=False)
heavy = ("torch", "transformers", "peft", "accelerate", "datasets", "lm_eval", "trl", "numpy", "pandas", "matplotlib")
print("imported:", [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(lines) - 2 and "Adapters" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_the_installed_command_works_as_a_process():
    command = [sys.executable, "-m", "routed_peft.cli", "inspect", "./no-such-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("routed-peft: './no-such-run' is no directory") and result.stderr.count("\n") == 1
