"""Pretraining with several regions that work when they are on."""

from __future__ import annotations

import json
import random
import runpy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_parts import write_jsonl
from places import ROOT
from recipe_parts import run_here
from transformers import AutoModelForCausalLM

from routed_peft import RoutedTrainer
from routed_peft.checkpoint import inspect_checkpoint
from routed_peft.regions.config import PARTS

WORDS = {
    "bio": ["cell", "gene"],
    "cyber": ["port", "shell"],
    "retain": ["river", "music"],
    "unlabeled": ["cell", "river"],
}
CONFIG = ROOT / "recipes/configs/access.yaml"
SHORT = ["--max_steps", "4", "--warmup_steps", "1", "--logging_steps", "2", "--length", "16", "--disable_tqdm", "true"]
SMALL = ["--hidden_size", "16", "--intermediate_size", "32", "--num_hidden_layers", "2", "--vocab_size", "300"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    rng = random.Random(0)
    texts = {
        name: [" ".join(rng.choice([*some, "the", "of"]) for _ in range(12)) for _ in range(40)]
        for name, some in WORDS.items()
    }
    write_jsonl(
        tmp_path / "topics.jsonl",
        [{"text": text, "route_label": name} for name, some in texts.items() for text in some],
    )
    file = ["--train_file", str(tmp_path / "topics.jsonl"), "--use_cpu", "true", "--report_to", "none"]
    return [
        "recipes/pretrain.py",
        "--config",
        str(CONFIG),
        *file,
        *SHORT,
        *SMALL,
        "--output_dir",
        str(tmp_path / "out"),
    ]


def recipe(**settings: Any) -> Any:
    return runpy.run_path(str(ROOT / "recipes/pretrain.py"))["Recipe"](**settings)


@pytest.mark.slow
def test_one_run_trains_several_regions_and_is_ablated_to_its_base(command, tmp_path, capsys):
    run_here(command)
    assert "'consistency'" in capsys.readouterr().out, "the trainer has the schedule, not its routes alone"
    about = inspect_checkpoint(tmp_path / "out")
    assert not about["problems"] and {"bio", "bio/spread", "cyber", "retain"} <= set(about["routes"])
    for name in ("bio", "cyber"):
        config = json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())
        assert config["kind"] == "whole" and {part for part in PARTS if config[part]} == {"size", "r", "embeddings"}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["method"], summary["arm"], summary["steps"]) == ("access", "routed", 4)
    ablated = inspect_checkpoint(tmp_path / "out-ablated")
    assert ablated["kind"] == "plain checkpoint" and sorted(ablated["ablation"]["regions_removed"]) == ["bio", "cyber"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out-ablated").config.intermediate_size == 32


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_schedule_or_other_regions(command, tmp_path):
    command += ["--save_strategy", "steps", "--save_steps", "2", "--schedule", '{"rate": 4}', "--size", "4"]
    step = RoutedTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise InterruptedError
        return step(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(RoutedTrainer, "training_step", interrupted)
        run_here(command)
    command += ["--resume_from_checkpoint", "true"]
    for message, *other in [
        ("`spread` is 0.0 there, got 0.1", "--schedule", '{"spread": 0.1}'),
        (r"`regions` is \['bio', 'cyber'\] there, got \['cyber'\]", "--regions", "cyber"),
        ("`r` is None there, got 2", "--r", "2"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_here([*command, *other])
    run_here([*command, "--schedule", '{"consistency": 3.0}'])  # the same, in other words
    assert json.loads((tmp_path / "out/summary.json").read_text())["steps"] == 4


def test_a_region_has_the_parts_that_are_given():
    given = [
        ({}, {"size": 64}),
        ({"method": "access"}, {}),
        ({"r": 8}, {"r": 8}),
        ({"method": "access", "size": 8, "embeddings": "[3, 2]"}, {"size": 8, "embeddings": [2, 3]}),
        ({"method": "access", "embeddings": "4", "norms": True, "heads": 1}, {"heads": 1, "embeddings": 4, "norms": True}),
    ]  # fmt: skip
    for settings, expected in given:
        config = recipe(**settings).region_config()
        assert {name: getattr(config, name) for name in config.given_parts()} == expected


def test_the_settings_of_the_config_are_those_of_the_schedule():
    settings = yaml.safe_load(CONFIG.read_text())
    own = {name: settings[name] for name in ("method", "regions", "schedule")}
    assert asdict(recipe(**own)) == asdict(recipe(**own | {"schedule": json.dumps(own["schedule"])}))
    schedule = recipe(**own, size=4).region_schedule()
    assert (schedule.regions, schedule.consistency, schedule.rate) == (("bio", "cyber"), 3.0, 4.0)
    assert recipe(method="access", region="bio").regions == ["bio"]


def test_schedules_and_regions_that_cannot_be_are_refused_before_data_is_read():
    bad = [
        ({"schedule": {"consistent": 3}}, r"no setting 'consistent': it has core, consistency,"),
        ({"schedule": '{"regions": ["a"]}'}, "no setting 'regions'"),
        ({"schedule": "{"}, "`schedule` must be JSON, got '{'"),
        ({"schedule": "[1]"}, "schedule: the content must be dict"),
        ({"schedule": {"rate": "4"}}, "rate must be int | float, got '4'"),
        ({"schedule": {"consistency_rows": 2.5}}, "consistency_rows must be int, got 2.5"),
        ({"schedule": {"spread": 2}}, "`spread` must be a number from 0 to 1"),
        ({"schedule": {"core": "bio"}}, "`core` is the label of rows outside all regions"),
        ({"regions": ["bio", "bio"]}, "`regions` is a list of different names"),
        ({"region": "bio", "regions": ["cyber"]}, "leave one of them out"),
        ({"self_labels": True}, "`self_labels` tells forget rows from others"),
        ({"base_weight": 0.0}, "`base_weight` is not for `method: access`, got 0.0"),
        ({"method": "sgtm", "regions": ["a"]}, "`regions` needs `method: access`"),
        ({"method": "sgtm", "schedule": {"rate": 1}}, "`schedule` needs `method: access`"),
        ({"method": "random", "r": 2}, "silences as many units as `size`"),
        ({"embeddings": "some"}, "`embeddings` must be JSON, got 'some'"),
        ({"embeddings": "-1"}, '`embeddings` is "full", a rank'),
    ]
    for settings, message in bad:
        given = {"regions": ["bio", "cyber"]} if "method" not in settings and "region" not in settings else {}
        with pytest.raises(ValueError, match=message.replace("|", r"\|")) as error:
            recipe(**{"method": "access", **given, **settings})
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_region_without_a_document_is_named(command):
    with pytest.raises(ValueError, match="no document has the label 'law'"):
        run_here([*command, "--regions", "bio", "cyber", "law"])
