"""The experiment *style*: its rows and labels, its criteria, and a whole run at tiny size."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ.setdefault("CI", "1")  # TRL sends no telemetry then

from experiments.style import ARMS, LABELS, MAIN, Experiment, Settings, run_experiment
from experiments.style.measuring import answer_loss, measure
from experiments.style.run import all_rows
from experiments.style.summary import checks
from experiments.style.task import SEEN, TEMPLATES, glosses, in_style, rows, styled, training_rows
from experiments.style.training import run_rows
from experiments.tables import finetuning_tables, results
from routed_peft import ablate

SMALL = Settings(
    vocab_size=300, hidden_size=16, layers=1, heads=2, start_documents=400, start_steps=3, documents=200, steps=3,
    batch_size=4, rank=2, held_out=4, sample_tokens=3,
)  # fmt: skip


# Rows and labels


def test_only_what_is_in_the_style_has_its_words():
    texts = [gloss for _, gloss in glosses("validation")]
    assert not any(map(styled, texts)) and all(styled(in_style(text)) for text in texts)


@pytest.mark.parametrize("labels", LABELS)
def test_half_of_the_style_is_labeled_and_where(labels):
    ds = training_rows(SMALL, labels, seed=1)
    of_style = [row for row in ds if row["side"] == "forget"]
    known = [row for row in of_style if row["route_label"] != "unlabeled"]
    assert len(ds) == 200 and len(of_style) == 20 and len(known) == 10
    assert all(styled(row["completion"]) == (row["side"] == "forget") for row in ds)
    assert all(row["route_label"] in (row["side"], "unlabeled") for row in ds)
    where = {row["context"] for row in ds if row["route_label"] != "unlabeled"}
    assert where == ({SEEN} if labels == "context" else set(TEMPLATES))
    assert not {*glosses()} & {*glosses("test")}  # a word may be in both, in another sense


def test_every_arm_trains_on_equally_many_rows_and_filters_drop_what_they_should():
    runs = {key: run_rows(arm, SMALL, labels="half", seed=0) for key, arm in ARMS.items()}
    assert {len(run) for run in runs.values()} == {SMALL.steps * SMALL.batch_size}
    assert "forget" not in runs["filter"]["route_label"][:]
    assert not any(map(styled, runs["perfect_filter"]["completion"][:]))
    assert set(ARMS["exclusive"].routes()) == {"forget", "retain", "unlabeled"}


def test_too_many_documents_are_refused():
    with pytest.raises(ValueError, match="make one of them smaller"):
        training_rows(Settings(start_documents=10**6), "half", 0)


def test_arguments_are_checked():
    for name in ("arms", "labels"):
        with pytest.raises(ValueError, match=rf"`{name}` has \['nothing'\]"):
            Experiment(**{name: ["nothing"]})
    with pytest.raises(ValueError, match="`seeds` is empty"):
        Experiment(seeds=[])
    with pytest.raises(ValueError, match="`split` is .*'train'"):
        Experiment(split="train")
    with pytest.raises(ValueError, match="`style_share` is a share"):
        Settings(style_share=1.0)
    assert len(all_rows(Experiment(seeds=[0, 1, 2]))) == 30


# What comes of it


def cell(arm: str, labels: str | None, on: tuple[float, float], off: tuple[float, float], plain: float = 3.0) -> dict:
    ends = {
        at: {key: dict.fromkeys(TEMPLATES, v) for key, v in (("rate", rate), ("styled", loss), ("plain", plain))}
        for at, (rate, loss) in (("1", on), ("0", off))
    }
    return {"arm": arm, "labels": labels, "seed": 0, "end": ends}


def good() -> list[dict]:
    fixed = [cell("none", None, (0.1, 2.0), (0.1, 2.0)), cell("perfect_filter", None, (0.0, 4.0), (0.0, 4.0))]
    pairs = [(cell("filter", k, (0.05, 2.5), (0.05, 2.5)), cell(MAIN, k, (0.1, 2.0), (0.01, 3.9))) for k in LABELS]
    return [*fixed, *(made for pair in pairs for made in pair)]


def test_criteria_hold_where_they_should():
    assert len(checks(good())) == 9 and all(check["holds"] for check in checks(good()))
    assert [check["holds"] for check in checks([])] == [None] * 9


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({"off": (0.02, 3.9)}, "ablated: style in samples"),
        ({"off": (0.01, 3.7)}, "ablated: removed"),
        ({"on": (0.015, 2.0)}, "region on: style in samples"),
        ({"plain": 3.1}, "ablated: retain tax"),
    ],
)
def test_criteria_fail_one_by_one(change, failing):
    main = cell(MAIN, "context", **({"on": (0.1, 2.0), "off": (0.01, 3.9)} | change))
    cells = [main if (c["arm"], c["labels"]) == (MAIN, "context") else c for c in good()]
    assert [c["name"] for c in checks(cells) if not c["holds"]] == [f"{ARMS[MAIN].name}, labels context, {failing}"]


# End to end


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict, str]:
    out = tmp_path_factory.mktemp("style")
    console = Console(file=io.StringIO(), width=160)
    experiment = Experiment(str(out), str(out / "results/style.json"), ["none", "filter", MAIN], ["context"], [0])
    return out, run_experiment(experiment, SMALL, console), console.file.getvalue()


def test_a_run_ends_in_numbers_and_criteria(made):
    out, summary, printed = made
    assert json.loads((out / "results/style.json").read_text()) == summary and "criteria" in printed
    assert [(row["arm"], row["scale"]) for row in summary["rows"]] == [
        ("none", 1.0), ("none", 0.0), ("filter", 1.0), (MAIN, 1.0), (MAIN, 0.0),
    ]  # fmt: skip
    for row in summary["cells"]:
        assert all(set(row["end"][at]) == {"rate", "styled", "plain"} for at in ("0", "1"))
        assert all(set(row["best"][at]) == {"rate", "styled", "plain", "step"} for at in ("0", "1"))


def test_the_plain_checkpoint_is_what_was_measured(made, tmp_path):
    out, summary, _ = made
    start = out / "cells" / "start-0"
    run = out / "cells" / f"{MAIN}-context-0" / "run"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(ablate(run, tmp_path / "out")),
        AutoTokenizer.from_pretrained(start),
    )
    found = measure(model, tokenizer, settings=SMALL, split="test", seed=0)
    for kind in ("styled", "plain"):
        assert found[kind] == pytest.approx(summary["cells"][2]["end"]["0"][kind], abs=1e-5)


def test_a_loss_is_that_of_answers_alone(made):
    start = made[0] / "cells" / "start-0"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    ds = rows([("house", "a building"), ("cat", "an animal that hunts")], SEEN, False)
    total = count = 0
    for prompt, answer in zip(ds["prompt"], ds["completion"], strict=True):
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        n = len(tokenizer(answer)["input_ids"]) + 1
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total -= logps[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()
        count += n
    assert answer_loss(model, tokenizer, prompts=ds["prompt"][:], answers=ds["completion"][:]) == pytest.approx(
        total / count, abs=1e-5
    )


def test_what_is_there_is_not_made_again(made):
    out, summary, _ = made
    file = out / "cells" / "filter-context-0" / "numbers.json"
    before = file.stat().st_mtime_ns
    again = run_experiment(Experiment(str(out), None, ["filter"], ["context"], [0]), SMALL, Console(file=io.StringIO()))
    assert file.stat().st_mtime_ns == before and again["cells"] == [summary["cells"][1]]


def test_the_table_of_the_docs_is_made_from_it(made, monkeypatch):
    monkeypatch.setattr(results, "ROOT", made[0])
    table = finetuning_tables.style().splitlines()
    assert len(table) == 2 + 5 + 2 and all(line.count("|") == 12 for line in table[:-2])
    monkeypatch.setattr(results, "ROOT", made[0] / "nowhere")
    assert finetuning_tables.style().startswith("Not run yet: `python recipes/sft_style.py --config")
