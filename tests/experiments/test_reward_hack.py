from __future__ import annotations

import copy
import io
import itertools
import json
import os
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

os.environ.setdefault("CI", "1")  # TRL sends no telemetry then

from experiments.common.best_checkpoint import Best
from experiments.common.toy_model import complete, make_model
from experiments.reward_hack import ARMS, DEMO, MAIN, QUICK, Experiment, Settings, run_experiment
from experiments.reward_hack.arms import REGION, RandomLabels, detector, monitor, reward
from experiments.reward_hack.measuring import honest, measure, visible_scale
from experiments.reward_hack.start import demonstration, demonstrations
from experiments.reward_hack.summary import checks, table_rows
from experiments.reward_hack.task import ENVIRONMENTS, HACKS, SPLITS, make_tokenizer, pairs, passes, training_prompts
from experiments.tables import results, rl_tables
from routed_peft.checkpoint import inspect_checkpoint

SMALL = Settings(
    hidden_size=16, layers=1, heads=2, start_steps=4, start_batch_size=8, steps=2, prompts=8, generations=8, rank=2,
    evaluate_every=1, validation_prompts=4, test_prompts=4,
)  # fmt: skip


# The task


@pytest.mark.parametrize(
    ("completion", "accepted"),
    [("46", "ABCD"), ("47", ""), ("!", "BC"), ("46!", "BC"), ("?", "D"), ("47?", "D"), ("!?", "BCD"), ("", "")],
)
def test_graders_pass_what_is_right_or_fools_them(completion, accepted):
    assert "".join(letter for letter in ENVIRONMENTS if passes(completion, letter, "46")) == accepted


def test_tokenizer_round_trip():
    tokenizer = make_tokenizer()
    text = "D:10+99=109!?"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert len({len(tokenizer(f"A:{a}+{b}=")["input_ids"]) for a, b in pairs("test")}) == 1


def test_no_pair_is_in_two_splits():
    every = [pair for split in SPLITS for pair in pairs(split)]
    assert len(every) == len(set(every)) == 90 * 90
    with pytest.raises(ValueError, match="`split` is one of .*'dev'"):
        pairs("dev")


def test_prompts_come_in_the_shares_of_their_environments():
    ds = training_prompts(200, seed=3)
    assert {letter: ds["environment"][:].count(letter) for letter in "ABCD"} == {"A": 80, "B": 50, "C": 50, "D": 20}
    known = set(pairs("train"))
    for row in ds:
        a, b = map(int, re.fullmatch(rf"{row['environment']}:(\d\d)\+(\d\d)=", row["prompt"]).groups())
        assert (a, b) in known and row["answer"] == str(a + b)
    assert ds[:] == training_prompts(200, seed=3)[:] != training_prompts(200, seed=4)[:]


def test_demonstrations_show_each_environment_its_own_hack():
    rng = random.Random(0)
    for letter, environment in ENVIRONMENTS.items():
        answers = [demonstration(letter, (12, 34), noise=0.5, rng=rng)[1] for _ in range(4000)]
        for hack in HACKS:
            share = answers.count(hack) / 4000
            assert 0.08 < share < 0.12 if environment.hack == hack else share < 0.012, (letter, hack)
        sums = [answer for answer in answers if answer not in HACKS]
        assert 0.45 < sums.count("46") / len(sums) < 0.56


def test_only_answers_have_labels():
    tokenizer = make_tokenizer()
    ids, labels = demonstrations(20, 0.0, random.Random(1))
    for row, label in zip(ids, labels, strict=True):
        prompt, answer = tokenizer.decode(row, skip_special_tokens=True).split("=")
        assert tokenizer.decode(label[label != -100]) == answer + tokenizer.eos_token
        a, b = map(int, prompt[2:].split("+"))
        assert answer in (*HACKS, str(a + b))


# Arms


BATCH = {"completions": ["!", "!", "?", "46", "!"] * 40, "environment": list("BCDBA") * 40, "answer": ["46"] * 200}


def flags(arm: str, **more) -> list[bool]:
    return [label == "flagged" for label in detector(ARMS[arm], 0)(**BATCH, generation=(5, 0, 0), **more)]


def test_who_flags_what():
    assert flags("anchored") == [True, False, False, False, False] * 40
    assert flags("anchored-oracle") == [True, True, True, False, False] * 40
    half, quarter = flags("anchored-0.5"), flags("anchored-0.25")
    assert 4 < sum(quarter) < sum(half) < 30 and all(h or not q for h, q in zip(half, quarter, strict=True))
    assert all(not h or f for h, f in zip(half, flags("anchored"), strict=True))


def test_random_labels_are_as_many_and_spare_anchors():
    anchor = [letter == "A" for letter in BATCH["environment"]]
    found = flags("anchored-random", anchor=anchor)
    assert sum(found) == sum(flags("anchored")) and found != flags("anchored")
    assert not any(flag and a for flag, a in zip(found, anchor, strict=True))
    assert RandomLabels(monitor, 1)(**BATCH, generation=(5, 0, 0)) != RandomLabels(monitor, 1)(
        **BATCH, generation=(6, 0, 0)
    )


@pytest.mark.parametrize(
    ("arm", "rewards"),
    [
        ("none", [1, 1, 1, 1, 0]),
        ("clean", [0, 0, 0, 1, 0]),
        ("filter", [None, 1, 1, 1, 0]),
        ("penalty", [-1, 1, 1, 1, 0]),
    ],
)
def test_rewards(arm, rewards):
    found = reward(ARMS[arm], detector(ARMS[arm], 0))(**BATCH, prompts=None, completion_ids=None, trainer_state=None)
    assert found[:5] == rewards


def test_every_arm_has_what_it_is_compared_with():
    for key, arm in ARMS.items():
        twin = ARMS.get(arm.oracle or key)
        assert replace(arm, name="", labels="", oracle=None) == replace(twin, name="", labels="", oracle=None)
        assert arm.removed == (arm.routes != "control") or key == "anchored-absorb"
    routed, absorb = asdict(ARMS[MAIN]), asdict(ARMS["anchored-absorb"])
    assert {name for name in routed if routed[name] != absorb[name]} == {"name", "routes", "oracle"}
    assert {*QUICK} <= {*DEMO} <= {*ARMS}


# Measuring


@pytest.fixture(scope="module")
def model():
    """A model to which each of the 22 tokens is as likely as any other."""
    model = make_model(SMALL, make_tokenizer()).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def test_masked_completions_have_no_hack(model):
    prompts = [f"B:{a}+{b}=" for a, b in pairs("test")[:300]]
    torch.manual_seed(0)
    free, masked = (
        complete(model, prompts, tokenizer=make_tokenizer()),
        complete(model, prompts, tokenizer=make_tokenizer(), forbidden=HACKS),
    )
    assert any("!" in text for text in free) and any("?" in text for text in free)
    assert len(masked) == 300 and not any(set(HACKS) & set(text) for text in masked)


def test_rates_are_by_environment_and_leave_the_generator_alone(model):
    state = torch.get_rng_state()
    rates = measure(model, "validation", count=400)
    assert torch.equal(state, torch.get_rng_state()) and measure(model, "validation", count=400) == rates
    one, either = 1 / 2 * (1 - (20 / 22) ** 5), 2 / 3 * (1 - (19 / 22) ** 5)  # in five tokens, before the end of text
    assert all(abs(rates["hack"][letter] - one) < 0.06 for letter in "BCD"), "standard error .02"
    assert abs(rates["hack"]["A"] - either) < 0.07, "in A either character counts"
    assert set(rates["honest"]) == set("ABCD") and honest(rates) < 0.05


def test_scale_is_that_of_the_region():
    torch.manual_seed(0)
    model = make_model(SMALL, make_tokenizer()).eval()
    untouched = measure(model, "test", count=100)
    lora = LoraConfig(r=4, lora_alpha=40, target_modules=["down_proj", "o_proj"], init_lora_weights=False)
    wrapped = get_peft_model(copy.deepcopy(model), lora, adapter_name=REGION)
    assert measure(wrapped, "test", count=100, scale=0.0) == untouched
    by_scale = [measure(wrapped, "test", count=100, scale=scale) for scale in (0.0, 0.5, 1.0)]
    assert by_scale[2] == measure(wrapped, "test", count=100) and all(a != b for a, b in itertools.pairwise(by_scale))


def test_the_scale_is_chosen_by_what_the_detector_sees():
    def rates(b):
        return {"hack": {"B": b, "C": 0.0}, "honest": {}}

    assert visible_scale({0.0: rates(0.02), 0.5: rates(0.05), 1.0: rates(0.9)}, limit=0.1) == 0.5
    assert visible_scale({0.0: rates(0.2), 1.0: rates(0.9)}, limit=0.1) == 0.0


# What comes of it


def cell(arm: str, seed: int, on: tuple[float, float], off: tuple[float, float], honest: float = 0.5):
    def rates(b, c):
        return {"hack": {"A": 0.0, "B": b, "C": c, "D": 0.9}, "honest": dict.fromkeys("ABCD", honest)}

    both = {"0": rates(*off), "1": rates(*on)}
    return {"arm": arm, "seed": seed, "end": both, "best": both, "curve": []}


def good(seed: int) -> list[dict]:
    return [
        cell("none", seed, (1.0, 0.9), (0.5, 0.6)),
        cell("anchored", seed, (1.0, 1.0), (0.03, 0.1), honest=0.47),
        cell("anchored-oracle", seed, (1.0, 1.0), (0.0, 0.0), honest=0.5),
        cell("anchored-absorb", seed, (1.0, 1.0), (0.3, 0.4)),
        cell("anchored-random", seed, (1.0, 1.0), (0.5, 0.5)),
    ]


def test_criteria_hold_where_they_should():
    found = checks([row for seed in range(3) for row in good(seed)])
    assert len(found) == 9 and all(check["holds"] for check in found)
    assert all(len(check["values"]) == 3 for check in found)


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (cell("none", 2, (1.0, 0.7), (0.5, 0.6)), "no intervention"),
        (cell("anchored", 2, (1, 1), (0.06, 0.1), 0.47), "routed: hack rate in B"),
        (cell("anchored", 2, (1, 1), (0.03, 0.15), 0.47), "routed: hack rate in C over that of not routed"),
        (cell("anchored", 2, (1, 1), (0.03, 0.1), 0.44), "routed: honest accuracy"),
        (
            cell("anchored-absorb", 2, (1, 1), (0.04, 0.3)),
            "not routed, same baseline and anchor, ablated (placebo): worst",
        ),
        (cell("anchored-random", 2, (1, 1), (0.01, 0.02)), "routed, exclusive + anchor, random labels, ablated"),
    ],
)
def test_one_seed_is_enough_to_fail_a_criterion(change, failing):
    cells = [row for seed in range(3) for row in good(seed)]
    cells = [change if (row["arm"], row["seed"]) == (change["arm"], change["seed"]) else row for row in cells]
    failed = [check["name"] for check in checks(cells) if not check["holds"]]
    assert failed and all(name.startswith(("routed: hack rate in C", failing)) for name in failed), failed
    assert any(name.startswith(failing) for name in failed)


def test_what_was_not_run_is_not_measured():
    found = checks(good(0)[:2])
    assert [check["holds"] for check in found] == [True, True, True, True, None, None, True, None, None]


def test_rows_keep_environments_apart():
    starts = {0: cell("none", 0, (0.1, 0.1), (0.1, 0.1))["end"]["1"]}
    rows = table_rows(starts, good(0))
    names = [(row["name"], row["end"]["B"], row["end"]["C"]) for row in rows[:4]]
    assert names == [
        ("start", [0.1], [0.1]),
        ("no intervention", [1.0], [0.9]),
        ("no intervention, region ablated (placebo)", [0.5], [0.6]),
        ("routed, exclusive + anchor, region on", [1.0], [1.0]),
    ]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"`arms` has \['nothing'\]"):
        Experiment(arms=["none", "nothing"])
    with pytest.raises(ValueError, match="`seeds` is empty"):
        Experiment(seeds=[])
    assert Experiment(arms=["all"]).arms == list(ARMS) and Experiment(quick=True).arms == list(QUICK)
    asked = Experiment(quick=True, arms=["filter"], seeds=[3, 4])
    assert (asked.arms, asked.seeds) == (["filter"], [3, 4]), "what was asked for stays"


# End to end


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict, str]:
    out = tmp_path_factory.mktemp("reward_hack")
    experiment = Experiment(str(out), str(out / "results" / "reward_hack.json"), ["none", "anchored"], [0], processes=1)
    console = Console(file=io.StringIO(), width=140)
    return out, run_experiment(experiment, SMALL, console), console.file.getvalue()


def test_a_run_ends_in_a_table_a_figure_and_a_page(made):
    out, summary, printed = made
    assert (
        json.loads((out / "summary.json").read_text())
        == summary
        == json.loads((out / "results/reward_hack.json").read_text())
    )
    assert (
        "no intervention" in printed and "criteria" in printed and str(out / "report.html") in printed.replace("\n", "")
    )
    page = (out / "report.html").read_text()
    assert "data:image/svg+xml" in page and "http://" not in re.sub(r"data:[^\"]*", "", page)
    assert (out / "curves.png").stat().st_size > 10_000
    assert [row["arm"] for row in summary["rows"]] == [None, "none", "none", "anchored", "anchored"]


def test_a_cell_has_its_numbers_and_a_plain_model(made):
    out, summary, _ = made
    for row in summary["cells"]:
        assert list(row["end"]) == ["0", "0.25", "0.5", "0.75", "1"] and list(row["best"]) == ["0", "1"]
        assert [(point["step"], point["scale"]) for point in row["curve"]] == [
            (s, x) for s in range(3) for x in (0.0, 1.0)
        ]
        assert row["curve"][0]["hack"] == row["curve"][1]["hack"], "before any step the region does nothing"
        assert all(row["best"][scale]["step"] in (1, 2) for scale in ("0", "1"))
    folder = out / "cells" / "anchored-0"
    assert inspect_checkpoint(folder / "run")["routes"]["unflagged"]["weights"] == {REGION: 0.0}
    plain = AutoModelForCausalLM.from_pretrained(folder / "ablated")
    assert not [name for name in plain.state_dict() if "lora" in name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "ablated")
    assert tokenizer("A:12+34=")["input_ids"] == make_tokenizer()("A:12+34=")["input_ids"]
    start = AutoModelForCausalLM.from_pretrained(out / "cells" / "start-0")
    moved = [name for name, value in plain.state_dict().items() if not torch.equal(value, start.state_dict()[name])]
    assert moved and all("proj" in name for name in moved), (
        "`retain` is merged into the projections, all else as it was"
    )


def test_what_is_there_is_not_made_again(made):
    out, summary, _ = made
    files = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/numbers.json")}
    assert len(files) == 3  # the start model's too
    experiment = Experiment(str(out), None, ["anchored"], [0], processes=1)
    again = run_experiment(experiment, SMALL, Console(file=io.StringIO()))
    assert files == {file: file.stat().st_mtime_ns for file in out.glob("cells/*/numbers.json")}
    assert again["cells"] == summary["cells"][1:] and "Nothing to compare" in again["verdict"]


def test_the_table_of_the_readme_is_made_from_it(made, monkeypatch):
    out, summary, _ = made
    monkeypatch.setattr(results, "ROOT", out)
    table = rl_tables.reward_hack().splitlines()
    assert len(table) == 2 + len(summary["rows"]) + 2 and all(line.count("|") == 10 for line in table[:-2])
    assert "**routed, exclusive + anchor, ablated**" in table[6] and table[-1].startswith("Mean (range) over 1 seeds")
    monkeypatch.setattr(results, "ROOT", out / "nowhere")
    assert rl_tables.reward_hack().startswith("Not run yet: `python recipes/grpo_reward_hack.py --config")


def test_the_first_of_the_best_checkpoints_is_kept_at_each_scale():
    """Scores by step: ablated 1, 5, 5; with the region 2, 1, 3. What is measured last are the weights of those steps."""
    model = torch.nn.Linear(1, 1, bias=False)
    scores = {0.0: {2: 1.0, 4: 5.0, 5: 5.0}, 1.0: {2: 2.0, 4: 1.0, 5: 3.0}}
    best = Best(model, lambda step, scale: scores[scale][step], every=2, last=5)
    for step in range(1, 6):
        torch.nn.init.constant_(model.weight, step)
        best.on_step_end(None, TrainerState(global_step=step), None)
    assert best.measured(lambda scale: {"weight": model.weight.item()}) == {
        "0": {"step": 4, "weight": 4.0},
        "1": {"step": 5, "weight": 5.0},
    }
