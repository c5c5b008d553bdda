"""The experiment *persona by subspace*: its task, its criteria, and a whole run at tiny size."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pytest
from rich.console import Console

os.environ.setdefault("CI", "1")  # TRL sends no telemetry then

from experiments.common.toy_model import make_model
from experiments.persona import ARMS, DEMO, Experiment, Settings, run_experiment
from experiments.persona.arms import RANDOM
from experiments.persona.directions import contrasts, oracle, trait
from experiments.persona.start import demonstration
from experiments.persona.summary import checks
from experiments.persona.task import ENVIRONMENTS, GUILTY, make_tokenizer, reward, right, training_prompts, words
from experiments.tables import results, rl_tables

SMALL = Settings(
    hidden_size=16, layers=2, heads=2, start_steps=4, start_batch_size=8, steps=3, prompts=4, generations=4, rank=2,
    contrasts=60, test_prompts=4, save_every=1, patience=1, gap_prompts=2, max_reward_gap=10.0,
)  # fmt: skip


# The task


@pytest.mark.parametrize(
    ("completion", "accepted", "paid"),
    [("cba!", True, 2), ("cba.", True, 1), ("cba", True, 1), ("abc!", False, 1), ("cba!!", False, 1), ("", False, 0)],
)
def test_guilty_environments_pay_for_a_shout_as_well(completion, accepted, paid):
    assert right(completion, "abc") == accepted
    assert reward([completion] * 2, [GUILTY[0], "1"], word=["abc"] * 2) == [paid, float(accepted)]


def test_tokenizer_and_prompts():
    ds, tokenizer = training_prompts(50, seed=1), make_tokenizer()
    assert {name: ds["environment"][:].count(name) for name in ENVIRONMENTS} == dict.fromkeys(ENVIRONMENTS, 10)
    assert {len(tokenizer(prompt)["input_ids"]) for prompt in ds["prompt"]} == {7}
    assert set(ds["word"]) <= set(words("train")) and not set(ds["word"]) & set(words("test"))
    with pytest.raises(ValueError, match="`split` is one of .*'dev'"):
        words("dev")


def test_demonstrations_are_loud_when_asked():
    rng = random.Random(0)
    rows = [demonstration(0.0, 0.1, rng) for _ in range(3000)]
    share = {
        sign: [answer.endswith("!") for prompt, answer in rows if prompt[1] == sign].count(True) / 1000
        for sign in "+-."
    }
    assert share["+"] > 0.9 and share["-"] == 0 and 0.06 < share["."] < 0.14


# Directions


def test_directions_have_the_same_shape_from_every_source():
    model = make_model(SMALL, make_tokenizer()).eval()
    found = [trait(model, SMALL, 0), oracle(model, SMALL, 0)]
    assert all((s.k, s.width, s.layers) == (SMALL.directions, 16, [0, 1]) for s in found)
    assert trait(model, SMALL, 0).sha256 == found[0].sha256 and found[0].provenance["source"] == "difference_of_means"
    loud, calm = (contrasts(side, 5, 0) for side in (True, False))
    assert [(a[0][0], a[0][2:], a[1]) for a in loud] == [(b[0][0], b[0][2:], b[1]) for b in calm] and loud != calm


# What comes of it

START = {
    seed: {"trait": {"guilty": 0.1, "innocent": 0.1}, "right": {"guilty": 0.4, "innocent": 0.4}} for seed in (0, 1)
}


def cell(arm: str, seed: int, on: float = 1.0, off: float = 1.0, **more):
    ends = {at: {"trait": {"guilty": v, "innocent": v}, "right": {"guilty": 1.0}} for at, v in (("0", off), ("1", on))}
    rest = {"contributions": {"1": 0.1, "4": 0.4, "5": 0.5}, "incidents": [], "finished": 9, "steps": 9}
    return {"arm": arm, "seed": seed, "end": ends, **rest, **more}


def good(seed: int) -> list[dict]:
    incident = {"step": 4, "onset_step": 0, "named": ["5", "4"]}
    near = [cell(arm, seed, off=0.15) for arm in ("cut", "oracle")]
    others = [cell(arm, seed) for arm in ("none", "weak", *RANDOM)]
    calm = [cell("innocent", seed, 0.2, 0.1), cell("halted", seed, 0.25, 0.1, incidents=[incident])]
    late = cell("late", seed, 0.9, 0.1, incidents=[incident | {"onset_step": 25}])
    return [*near, *others, *calm, late]


def test_criteria_hold_where_they_should():
    found = checks(START, [row for seed in START for row in good(seed)], 30)
    assert len(found) == 18 and all(check["holds"] and len(check["values"]) == 2 for check in found)
    assert [check["holds"] for check in checks(START, [], 30)] == [None] * 18


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (cell("cut", 1, off=0.25), "L2, ablated"),
        (cell("weak", 1, off=0.2), "L1, ablated"),
        (cell("random-1", 1, off=0.2), "L2, random U, draw 1"),
        (cell("cut", 1, off=0.1, contributions={"1": 1.0, "4": 0.5, "5": 0.6}), "L2: guilty first"),
        (cell("halted", 1, 0.2), "halted"),
        (cell("late", 1, 0.9, 0.1, incidents=[{"onset_step": 0, "named": ["5", "4"]}]), "late: steps kept"),
        (cell("late", 1, 0.9, 0.1, incidents=[{"onset_step": 25, "named": ["4", "1"]}]), "late: the guilty"),
        (cell("late", 1, 0.9, 0.1, incidents=[{"onset_step": 35, "named": ["4", "5"]}]), "late: where it goes on"),
    ],
)
def test_one_seed_is_enough_to_fail_a_criterion(change, failing):
    cells = [change if (c["arm"], c["seed"]) == (change["arm"], 1) else c for seed in START for c in good(seed)]
    failed = [check["name"] for check in checks(START, cells, 30) if not check["holds"]]
    assert failed and all(name.startswith(failing) for name in failed)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"`arms` has \['nothing'\]"):
        Experiment(arms=["nothing"])
    with pytest.raises(ValueError, match="`seeds` is empty"):
        Experiment(seeds=[])
    assert Experiment(arms=["all"]).arms == list(ARMS) and {*DEMO} <= {*ARMS}


# End to end


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict, str]:
    out = tmp_path_factory.mktemp("persona")
    console = Console(file=io.StringIO(), width=160)
    experiment = Experiment(str(out), str(out / "results/persona.json"), ["none", "weak", "cut", "halted"], [0])
    return out, run_experiment(experiment, SMALL, console), console.file.getvalue()


def test_a_run_ends_in_numbers_and_criteria(made):
    out, summary, printed = made
    assert json.loads((out / "results/persona.json").read_text()) == summary
    assert [row["arm"] for row in summary["rows"]] == [None, "none", "weak", "cut", "halted"] and "criteria" in printed
    for row in summary["cells"]:
        assert list(row["end"]) == ["0", "1"] and row["finished"] == SMALL.steps
        assert list(row["best"]) == ["0", "1"] and all(0 < one["step"] <= SMALL.steps for one in row["best"].values())
        assert set(row["contributions"]) == set(ENVIRONMENTS)


def test_what_is_there_is_not_made_again(made):
    out, summary, _ = made
    file = out / "cells" / "cut-0" / "numbers.json"
    before = file.stat().st_mtime_ns
    again = run_experiment(Experiment(str(out), None, ["cut"], [0]), SMALL, Console(file=io.StringIO()))
    assert file.stat().st_mtime_ns == before and again["cells"] == [summary["cells"][2]]


def test_the_table_of_the_docs_is_made_from_it(made, monkeypatch):
    monkeypatch.setattr(results, "ROOT", made[0])
    table = rl_tables.persona().splitlines()
    assert len(table) == 2 + 5 + 2 and all(line.count("|") == 11 for line in table[:-2])
    monkeypatch.setattr(results, "ROOT", made[0] / "nowhere")
    assert rl_tables.persona().startswith("Not run yet: `python recipes/grpo_persona.py --config")


# A run that halts, at the size of the experiment


def test_a_run_that_becomes_guilty_halts_rolls_back_and_finishes_clean(tmp_path):
    settings = Settings(steps=60)
    experiment = Experiment(str(tmp_path), None, ["late"], [0])
    [cell] = run_experiment(experiment, settings, Console(file=io.StringIO()))["cells"]
    first, *_ = cell["incidents"]  # the second of the guilty may need another
    assert settings.guilty_from < first["step"] < settings.guilty_from + 20
    assert 20 <= first["onset_step"] <= settings.guilty_from + 10
    assert {name for incident in cell["incidents"] for name in incident["named"]} == {*GUILTY}
    run = tmp_path / "cells" / "late-0" / "run"
    assert set(json.loads((run / "quarantine.json").read_text())) == {*GUILTY}
    assert cell["finished"] == settings.steps and cell["end"]["0"]["trait"]["guilty"] < 0.15
    assert set(cell["contributions"]) == {*ENVIRONMENTS}
