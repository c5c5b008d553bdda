from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import pytest
from places import ROOT
from transformers import TrainingArguments

from routed_peft.runs.command_line import parse_settings, run_recipe


@dataclass
class Recipe:
    place: str = field(metadata={"help": "Required."})
    arm: str = field(default="routed", metadata={"choices": ["routed", "none"]})
    routes: dict | str | None = None
    words: list[str] = field(default_factory=list)
    layers: list[int] | None = None
    share: float = 0.5
    size: int = 8
    train_base: bool = False


@pytest.fixture
def parse(tmp_path, monkeypatch):
    def parse(text: str, *flags: str) -> Recipe:
        (tmp_path / "config.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(tmp_path / "config.yaml"), *flags])
        recipe, _ = parse_settings(Recipe, TrainingArguments, report_to="none")
        return recipe

    return parse


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("arm: routd", "arm: invalid choice: 'routd' .choose from '?routed'?, '?none'?"),
        ("arm: Routed", "invalid choice: 'Routed'"),
        ("arm: null", "`arm` must be one value, got nothing"),
        ("arm: [routed]", "`arm` must be one value, got a list"),
        ("arm: no", "`arm` must not be no or false without quotes"),
        ("size: eight", "size: invalid int value: 'eight'"),
        ("size: 8.5", "invalid int value: '8.5'"),
        ("size: true", "`size` must not be yes or true without quotes"),
        ("share: half", "invalid float value"),
        ("share: .nan", "`share` must be a number, got nan"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("learning_rate: .nan", "`learning_rate` must be a number, got nan"),
        ("train_base: maybe", "Truthy value expected"),
        ("layers: [0, x]", "invalid int value: 'x'"),
        ("layers: {a: 1}", "`layers` must be one value, got a mapping"),
        ("words: [a, {b: c}]", "`words` must be one value, got a mapping"),
        ("eval_strategy: no", "`eval_strategy` must not be no or false without quotes"),
        ("eval_strategy: sometimes", "eval_strategy.*sometimes"),
        ("amr: routed", "unknown setting 'amr': did you mean 'arm'?"),
        ("learning_rte: 1", "did you mean 'learning_rate'?"),
        ("zzz: 1", "unknown setting 'zzz': see `--help`"),
        ("7: 1", "unknown setting '7'"),
        ("arm: none\narm: routed", "`arm` is given twice"),
        ("env: [A]", "`env` must map names to values"),
        ("- arm", "must hold settings as `name: value`, got list"),
        ("", "must hold settings as `name: value`, got NoneType"),
        ("arm: [", "not readable YAML"),
    ],
)
def test_a_mistake_in_yaml_is_refused_with_its_file(parse, line, message):
    with pytest.raises(ValueError, match=rf"config\.yaml: .*{message}"):
        parse(line, "--place", "x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "routd"], "invalid choice: 'routd'"),
        (["--ar", "none"], "unknown setting '--ar': did you mean '--arm'?"),
        (["--sise=3"], "unknown setting '--sise': did you mean '--size'?"),
        (["--share", "nan"], "`share` must be a number, got nan"),
        (["--size"], "expected one argument"),
        (["stray"], "unknown setting 'stray'"),
    ],
)
def test_a_mistake_in_flags_is_refused(parse, flags, message):
    with pytest.raises(ValueError, match=message):
        parse("arm: none", "--place", "x", *flags)


def test_a_required_setting_may_stand_in_either(parse):
    assert parse("place: here").place == "here" and parse("arm: none", "--place", "there").place == "there"
    with pytest.raises(ValueError, match="are required: --place"):
        parse("arm: none")


def test_values_of_yaml_are_those_of_flags(parse):
    recipe = parse(
        "place: 7\narm: none\nroutes: {a: {weights: {base: 0}}}\nwords: one\nlayers: [1, 2]\nshare: 1e-1\ntrain_base: 1\n"
        "resume_from_checkpoint: true\nwarmup_steps: 3\nlr_scheduler_kwargs: {a: 1}",
        "--size", "3",
    )  # fmt: skip
    expected = Recipe("7", "none", {"a": {"weights": {"base": 0}}}, ["one"], [1, 2], 0.1, 3, True)
    assert recipe == expected and recipe.train_base is True
    assert parse("place: x\nlayers: null\nwords: []").layers is None


def test_environment_variables_of_yaml_are_set(parse, monkeypatch):
    monkeypatch.setenv("ROUTED_PEFT_TEST", "0")
    parse("place: x\nenv: {ROUTED_PEFT_TEST: 1}")
    assert os.environ["ROUTED_PEFT_TEST"] == "1"


def fail() -> None:
    raise ValueError("got 1,\nexpected 2")


@pytest.mark.parametrize(("rank", "line"), [("0", "recipe.py: got 1, expected 2\n"), ("1", "")])
def test_a_recipe_ends_in_one_line_of_the_main_process(monkeypatch, capsys, rank, line):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["recipes/recipe.py"])
    with pytest.raises(SystemExit) as ended:
        run_recipe(fail)
    assert ended.value.code == 1 and capsys.readouterr().err == line


def test_debug_shows_the_traceback_and_a_trainers_own_flag_stays(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--debug", "--size", "3"])
    with pytest.raises(ValueError, match="got 1"):
        run_recipe(fail)
    assert sys.argv == ["recipe.py", "--size", "3"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--debug", "underflow_overflow"])
    with pytest.raises(SystemExit):
        run_recipe(fail)
    assert sys.argv[1:] == ["--debug", "underflow_overflow"]


@pytest.mark.parametrize("recipe", [file.name for file in sorted((ROOT / "recipes").glob("*.py"))])
def test_every_recipe_takes_its_settings_from_here(recipe):
    text = (ROOT / "recipes" / recipe).read_text()
    assert "TrlParser" not in text and "run_recipe(" in text
