from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from transformers import AutoModelForCausalLM

os.environ.setdefault("CI", "1")  # TRL sends no telemetry then

from experiments.common.toy_model import ToySettings, make_model
from experiments.reward_hack.task import make_tokenizer, training_prompts
from routed_peft.checkpoint import inspect_checkpoint
from routed_peft.monitoring import Incident
from routed_peft.subspaces import Subspace
from routed_peft.training import RunDirectory

pytestmark = pytest.mark.slow  # each test waits for the launched run, or trains a model itself

CONFIGS = {file.stem: file for file in sorted((ROOT / "recipes/configs").glob("grpo*.yaml"))}
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "32", "--num_generations", "4", "--logging_steps", "1"]
SHORT += ["--use_cpu", "true", "--disable_tqdm", "true", "--rank", "2", "--learning_rate", "0.1"]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """An untrained model, prompts, and functions in a file of the user's own."""
    folder = tmp_path_factory.mktemp("task")
    torch.manual_seed(0)
    make_model(ToySettings(hidden_size=16, layers=1, heads=2), make_tokenizer()).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    training_prompts(40, seed=0).to_json(folder / "prompts.jsonl")
    Subspace.from_directions(torch.randn(2, 16), source="random").save(folder / "u.safetensors")
    (folder / "mine.py").write_text(
        "def digits(completions, **_):\n"
        "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n\n"
        "def short(completions, environment, **_):\n"
        "    return ['flagged' if len(text) < 3 else 'unflagged' for text in completions]\n"
    )
    return folder


def arguments(config: str, task: Path, out: Path, *more: str) -> list[str]:
    model = ["--model_name_or_path", str(task / "model"), "--train_file", str(task / "prompts.jsonl")]
    return ["recipes/grpo.py", "--config", str(CONFIGS[config]), "--output_dir", str(out), *model, *SHORT, *more]


def here(command: list[str]) -> None:
    """Run a recipe in this process, which spares the seconds of starting one; its warnings are errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--debug"])
        patch.setattr(sys, "orig_argv", ["python", *command])
        patch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")


@pytest.fixture(scope="module", autouse=True)
def launched(task, tmp_path_factory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run by `accelerate launch` from a directory of its own, going on beside the other tests."""
    out = tmp_path_factory.mktemp("launched") / "grpo"
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    script, *options = arguments("grpo", task, out)
    command = [accelerate, "launch", "--cpu", "--num_processes", "1", str(ROOT / script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=task, env=environment, **pipes) as process:
        yield process, out
        process.kill()


def test_labels_by_environment_and_functions_from_a_file(task, tmp_path):
    rewards = ["--reward_funcs", f"{task / 'mine.py'}:digits"]
    here(arguments("grpo_classic", task, tmp_path / "a", *rewards))
    by_environment = json.loads((tmp_path / "a/summary.json").read_text())
    assert by_environment["tokens_per_route"].keys() == {"flagged", "unflagged", "anchor"}
    flags = [point["routing/environment/B/flag_rate"] for point in RunDirectory(tmp_path / "a").points()
             if "routing/environment/B/flag_rate" in point]  # fmt: skip
    assert flags and set(flags) == {1.0}
    assert all(0 < reward < 5 for reward in by_environment["rewards"])
    mine = [*rewards, "--label_func", f"{task / 'mine.py'}:short", "--recall", "0.5", "--ablate_to", "no"]
    routes = '{"flagged": {"weights": {"base": 0}}, "unflagged": {}, "anchor": {"ablated": ["hack"]}}'
    here(arguments("grpo", task, tmp_path / "b", *mine, "--routes", routes, "--max_steps", "1"))
    assert not (tmp_path / "b-ablated").exists()
    assert inspect_checkpoint(tmp_path / "b")["routes"]["unflagged"] == {"weights": {}, "ablated": []}


def test_mistakes_are_explained_before_anything_is_loaded(task, tmp_path):
    command = arguments("grpo", task, tmp_path / "run")
    for flag in ("--model_name_or_path", "--train_file"):
        place = command.index(flag)
        with pytest.raises(ValueError, match=f"`{flag[2:]}` is not set"):
            here([*command[:place], *command[place + 2 :]])
    with pytest.raises(ValueError, match="are both set: leave one of them out"):
        here([*command, "--environment_labels", '{"B": "flagged"}'])
    with pytest.raises(FileNotFoundError, match="there is no file 'nothing.py'"):
        here([*command, "--reward_funcs", "nothing.py:grade"])
    with pytest.raises(ValueError, match="trl.rewards has no 'accuracy'"):
        here([*command, "--reward_funcs", "accuracy"])
    (tmp_path / "run-ablated").mkdir()
    (tmp_path / "run-ablated/file").touch()
    with pytest.raises(ValueError, match="`ablate_to` .*run-ablated is not empty"):
        here(command)


def test_a_region_along_a_subspace(task, tmp_path):
    file = str(task / "u.safetensors")
    more = ["--monitor", '{"action": "log", "every": 1}', "--reward_funcs", f"{task / 'mine.py'}:digits"]
    here(arguments("grpo_subspace", task, tmp_path / "run", "--subspace", file, *more))
    about = inspect_checkpoint(tmp_path / "run")
    assert about["routes"] == {"all": {"weights": {}, "ablated": []}} and not about["problems"]
    stays, region = (
        json.loads((tmp_path / "run" / name / "adapter_config.json").read_text()) for name in ("retain", "hack")
    )
    assert (region["kind"], region["strength"], stays["kind"]) == ("subspace", "cut", "lora")
    assert region["provenance"]["sha256"] == stays["provenance"]["sha256"] == Subspace.load(file).sha256
    points = RunDirectory(tmp_path / "run").points()
    assert any(f"monitor/hack/energy/{name}" in point for point in points for name in "ABCD")
    assert (tmp_path / "run-ablated/model.safetensors").exists()
    for more, message in (
        ([], "`method: subspace` needs `subspace`"),
        (["--subspace", file, "--recall", "0.5"], "takes no labels"),
        (["--subspace", file, "--labeled", "0.5"], "takes no labels"),
    ):
        with pytest.raises(ValueError, match=message):
            here(arguments("grpo_subspace", task, tmp_path / "no", *more))


def halting(task: Path, out: Path, *more: str) -> list[str]:
    """A run that halts at its first step, whatever it learns."""
    limits = '{"action": "halt", "every": 1, "patience": 1, "max_functional_size": 1e-9, "max_kl": null, "watch": []}'
    monitor = ["--monitor", limits, "--max_incidents", "1", "--reward_funcs", f"{task / 'mine.py'}:digits"]
    return arguments("grpo_monitored", task, out, *monitor, *more)


def test_a_run_that_halts_stops_or_goes_on_without_the_environments_to_blame(task, tmp_path):
    out = tmp_path / "run"
    here(halting(task, out, "--on_halt", "stop"))
    summary, incident = json.loads((out / "summary.json").read_text()), Incident.read(out)
    assert summary["steps"] == incident.step == 1 and summary["incidents"][0]["named"] == incident.named
    assert incident.named and not (tmp_path / "run-ablated").exists()
    with pytest.raises(RuntimeError, match="after 1 incidents"):  # which goes on from there, and halts again
        here(halting(task, out, "--on_halt", "drop"))
    assert json.loads((out / "quarantine.json").read_text()) == dict.fromkeys(incident.named, "drop")
    lines = [point for point in RunDirectory(out).points() if "monitor/status" in point]
    assert len(lines) == 1 and not any(f"monitor/hack/contribution/{name}" in lines[0] for name in incident.named)


@pytest.mark.parametrize("method", ["classic", "subspace"])
def test_environments_to_blame_are_routed_where_that_is_asked_for(task, tmp_path, method):
    out, more = tmp_path / "run", []
    if method == "subspace":
        more = ["--method", "subspace", "--subspace", str(task / "u.safetensors"), "--anchor_share", "0.1"]
    out.mkdir()
    Incident(1, 0, named=["C"]).write(out)  # of a run that halted
    trusted = ["--anchor_environments", "A", "C"]
    here(
        arguments("grpo_monitored", task, out, "--on_halt", "route", "--monitor", '{"action": "log"}', *trusted, *more)
    )
    points = [point for point in RunDirectory(out).points() if "routing/environment/C/flag_rate" in point]
    assert points and all(point["routing/environment/C/flag_rate"] == 1 for point in points)
    assert all(point.get("routing/environment/B/flag_rate", 0) == 0 for point in points)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["incidents"] == [{"step": 1, "onset_step": 0, "named": ["C"]}]
    assert summary["tokens_per_route"]["flagged"] > 0
    assert (tmp_path / "run-ablated/model.safetensors").exists()
    if method == "classic":  # quarantine is kept where the run is resumed by hand
        again = ["--resume_from_checkpoint", str(out / "checkpoint-2"), "--max_steps", "4", "--ablate_to", "no"]
        here(arguments("grpo_monitored", task, out, "--on_halt", "stop", "--monitor", '{"action": "log"}', *again))
        later = [p["routing/environment/C/flag_rate"] for p in RunDirectory(out).points() if p["step"] > 2 and
                 "routing/environment/C/flag_rate" in p]  # fmt: skip
        assert later and set(later) == {1.0}


def test_a_routed_environment_is_not_blamed_again(task, tmp_path):
    with pytest.raises(RuntimeError, match="after 1 incidents"):
        here(halting(task, tmp_path, "--on_halt", "route"))
    first, second = Incident.read(tmp_path / "incidents/1"), Incident.read(tmp_path)
    assert first.named and second.named and not {*first.named} & {*second.named}


def test_going_on_after_a_halt_needs_a_monitor(task, tmp_path):
    with pytest.raises(ValueError, match="`on_halt: drop` needs a `monitor`"):
        here(arguments("grpo", task, tmp_path / "run", "--on_halt", "drop"))


def test_labels_get_worse_by_a_seed_of_their_own(task, tmp_path):
    found = []
    for name, more in {
        "all": [],
        "half": ["--labeled", "0.5"],
        "again": ["--labeled", "0.5", "--label_seed", "7"],
    }.items():
        command = arguments("grpo_classic", task, tmp_path / name, "--max_steps", "1", "--ablate_to", "no", *more)
        here(command)
        points = RunDirectory(tmp_path / name).points()
        found.append(points[0]["routing/environment/B/flag_rate"])
    assert found[0] == 1 and 0 < found[1] < 1
    run = json.loads((tmp_path / "again/run.json").read_text())
    assert run["seeds"] == {"seed": 42, "label_seed": 7}


def test_defaults_are_those_that_did_best(task, tmp_path):
    """Trusted environments make anchors, and flagged rollouts are left out of the baseline, unless told otherwise."""
    for name, more in {"a": ["--anchor_environments", "A"], "b": ["--baseline_over", "group"]}.items():
        here(arguments("grpo_classic", task, tmp_path / name, "--max_steps", "1", "--ablate_to", "no", *more))
    told = [json.loads((tmp_path / name / "run.json").read_text())["config"]["training"] for name in "ab"]
    assert [(args["baseline_over"], args["anchor_share"]) for args in told] == [("unflagged", 0.25), ("group", 0.0)]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_short_and_commented(name):
    lines = CONFIGS[name].read_text().splitlines()
    assert len(lines) < 40 and lines[0].startswith("# ")
    assert yaml.safe_load("\n".join(lines))["output_dir"] == f"runs/{name}"


def test_a_launched_run_leaves_records_a_region_and_a_plain_model(launched, task):
    process, out = launched
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["method"] == "exclusive" and len(summary["rewards"]) == 2
    assert set(summary["tokens_per_route"]) == {"flagged", "unflagged", "anchor"}
    assert summary["tokens_per_route"]["anchor"] > 0 < summary["tokens_per_route"]["unflagged"]
    points = RunDirectory(out).points()
    assert [point["step"] for point in points] == [1, 2]
    assert all(point["routing/anchor_share"] == 0.25 and point["method"] == "exclusive" for point in points)
    about = inspect_checkpoint(out)
    assert about["routes"]["unflagged"]["weights"] == {"hack": 0.0} and not about["problems"]
    plain = AutoModelForCausalLM.from_pretrained(summary["ablated"]).state_dict()
    start = AutoModelForCausalLM.from_pretrained(task / "model").state_dict()
    assert plain.keys() == start.keys()
    assert any(not torch.equal(plain[name], start[name]) for name in plain), "`retain` learnt, and is merged"
