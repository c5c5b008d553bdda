from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from evaluation_parts import byte_tokenizer, tiny_llama
from places import ROOT
from report_parts import cells, summary
from transformers import AutoModelForCausalLM

from experiments.removal import Experiment, Settings
from experiments.removal.train_cell import attack_data
from experiments.report.attackers import attacker_documents
from experiments.tables import absent, page_figures
from experiments.tables import experiment_tables as tables
from experiments.tables import tradeoff_tables as tradeoff
from experiments.tables.overview_table import overview
from experiments.tables.results import load_experiment
from routed_peft.evaluation.relearning import Attack


@pytest.mark.slow
def test_tables_and_figures_of_the_readme_are_made_from_results():
    subprocess.run([sys.executable, ROOT / "docs" / "tables.py", "--check"], check=True)
    subprocess.run([sys.executable, ROOT / "docs" / "figures.py", "--check"], check=True)


@pytest.mark.slow
def test_figures_of_the_readme_can_be_drawn():
    for theme in page_figures.THEMES:
        assert page_figures.draw(theme).startswith("<?xml")
        assert page_figures.file_of(theme).name in (ROOT / "README.md").read_text()


def test_tables_of_experiments_say_what_their_numbers_say():
    about = {"attacks": ["forget"], "attack_steps": [0, 1, 3], "attack_rates": [1e-3], "extensions": 2}
    report = summary([row for seed in range(2) for row in cells(seed)]) | {"experiment": about}
    table = tables.losses(report, "make", labels=[(0.5, 1.0, 1.0)])
    assert "| **routed with self-labels, ablated** | 5.00 | 3.50 | 3.50 | 67 % | 0.10 |" in table
    assert "| control" not in table and "no attack" in table, "an attack that was none is no robustness"
    assert (
        "fine-tuning on all forget documents (held-out), 3 steps of 16 at most, all learning rates (0.001, and up to 2"
        in table
    )
    assert "at least 95 % removed: 66.7 % at 50 %" in table and table.endswith("From `make`.")
    assert tables.losses(report, "make", labels=[(0.1, 1.0, 1.0)]) == "Not run yet: `make`."
    wide = report | {"cells": [*report["cells"], *(row for row in cells(0, labeled=1.0) if row["labeled"])]}
    parts = [("verse", wide, [(0.5, 1.0, 1.0), (1.0, 1.0, 1.0)]), ("again", wide, [(0.5, 1.0, 1.0)])]
    table = overview(parts, ["filter", "routed"], "`make`")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| verse")]
    named = [["–", "no routing", "3.00"], ["50 %", "filter, same labels", "3.50"], ["–", "perfect filter", "6.00"]]
    named.insert(2, ["50 %", "**routed with self-labels, ablated**", "5.00"])
    assert [row[1:4] for row in rows] == named, "one seed of all labels is not shown beside two of half"
    assert rows[2][6:10] == ["67 % ✗", "0.10 ✗", "0.20", "+0.05 / +0.05"], "what misses a goal says so"
    asked = wide | {"experiment": about | {"methods": ["filter", "routed", "classifier_filter"]}}
    absent = "Asked for, and not run yet: filter by a TF-IDF classifier of these labels (50 %)."
    assert absent in tables.losses(asked, "make", labels=[(0.5, 1.0, 1.0)])
    assert absent.replace("50 %", "verse, 50 %") in overview(
        [("verse", asked, [(0.5, 1.0, 1.0)])], ["filter", "classifier_filter", "routed"], "`make`"
    )
    assert "Asked for" not in table
    assert "| again" not in table, "what two experiments share is said once"
    assert (
        "Relearned: after the worst of fine-tuning on all" in table
        and "over 2 seeds" in table
        and "From `make`." in table
    )
    alone = overview([("verse", wide, [(1.0, 1.0, 1.0)])], ["filter", "routed"], "`make`")
    assert "| verse | 100 % | **routed" in alone and "| filter, same" not in alone, "that is the perfect filter"
    found = tables.recovery(
        summary(cells(labeled=1.0))
        | {"experiment": about | {"attack_split": "train", "methods": ["undo-1"], "labeled_shares": [1.0]}},
        "make",
    )
    assert "| **routed, ablated** | 5.00 | 3.50 | 0.417 | > 3 (> 3 to > 3) |" in found
    assert "| no routing | 3.00 | – | – | 0 |" in found and "(the training set's)" in found
    assert "within 0.02 nats" in found and "{" not in found
    assert "Asked for, and not run yet: UNDO, alpha 1 (100 %). From `make`." in found
    few = report | {"experiment": about | {"attacks": ["few-shot-4"]}}
    assert tables.attack_description(few).startswith("fine-tuning on 4 forget documents (held-out)")


def test_tables_name_what_is_asked_for_and_not_there():
    about = {"attacks": ["forget"], "attack_steps": [0, 1, 3], "attack_rates": [1e-3], "seeds": [0, 1]}
    about |= {
        "methods": ["no_routing", "control", "filter", "routed", "sgtm", "npo"],
        "labeled_shares": [0.5, 0.1, 0.0],
    }
    rows = [row for seed in range(2) for row in cells(seed)]
    report = summary(rows + [row for row in cells(0, labeled=0.1) if row["labeled"]]) | {"experiment": about}
    half, tenth = (0.5, 1.0, 1.0), (0.1, 1.0, 1.0)
    assert absent.asked_labels(report) == [(0.0, 1.0, 1.0), tenth, half]
    assert absent.not_run(report, [half]) == {"SGTM’s routes, ablated": ["50 %"], "NPO": ["50 %"]}
    assert absent.sentence_on_missing(report, [half], ["filter"]) == []
    own = tables.losses(report, "make", labels=[half])
    assert "Asked for, and not run yet: SGTM’s routes, ablated / NPO (50 %). From `make`." in own
    (whole,) = absent.sentence_on_missing(report)
    names = "filter, same labels / routed with self-labels, ablated (0 %); SGTM’s routes, ablated (0 %; 10 %; 50 %)"
    assert whole == f"Asked for, and not run yet: {names}; NPO (10 %; 50 %).", (
        "without labels there is nothing to unlearn"
    )
    assert f"{whole} From `make`." in tables.losses(report, "make", labels=[half], methods=["filter"], name_all=True)
    assert 0.75 in load_experiment("spanish")["experiment"]["labeled_shares"], "as its YAML has it"


def test_tables_say_how_many_documents_attackers_have():
    settings, about = Settings(pair="arithmetic", limit=20), Experiment("s.json", attacks=["forget", "few-shot-16"])
    count = len(attack_data(Attack.parse("forget"), settings, about).forget_train)
    assert count == attacker_documents(asdict(settings), asdict(about)) > 16
    report = summary(cells(), pair="arithmetic", limit=20) | {"experiment": asdict(about)}
    assert tables.attack_description(report).startswith(
        f"fine-tuning on all {count} forget documents and on 16 of them (held-out)"
    )
    assert "on all forget documents and on 16" in tables.attack_description(report, counted=False)
    report["experiment"]["attacks"] = ["few-shot-16"]
    assert tables.attack_description(report).startswith(f"fine-tuning on 16 of {count} forget documents (held-out)")
    assert tables.documents_available(report) == f"{count} held-out forget documents"
    trained = asdict(settings), asdict(about) | {"attack_split": "train"}
    assert attacker_documents(*trained) > count
    assert attacker_documents({"pair": "mine", "limit": 20}, {}) is None, "not packaged"
    assert attacker_documents({"pair": "arithmetic"}, {}) is None, "it is not said which are scored"


def test_tables_of_what_is_traded_say_what_their_numbers_say():
    rows = [row for seed in range(2) for row in cells(seed)]
    rows += [row | {"method": "routed:robust_share=0.2"} for row in rows if row["method"] == "routed"]
    table = tradeoff.frontier(summary(rows, robust_share=0.05), "make")
    assert "| **nothing changed** | 5.00 | 3.50 | 67 % | 0.10 | 0.05 | 0.05 |" in table
    assert "| `robust_share` 0.2 (not 0.05) | 5.00 |" in table and "filter" not in table and "over 2 seeds" in table

    tokens = {"tokens_by_side": {"forget": 0, "retain": 1_000_000}, "unlabeled_tokens_by_side": {"forget": 12_500}}
    filters = [row | tokens for row in rows if row["method"] in ("filter", "perfect_filter")]
    rows = [row for row in rows if row["method"] == "no_routing"] + filters
    rows += [row | tokens | {"method": "routed"} for row in cells() if row["method"] == "routed"]
    table = tradeoff.leaking(summary(rows), "make")
    assert "| 50 % | filter, same labels | 3.50 | 3.40 | 0.00 | 12.5 k |" in table and "perfect" not in table

    about = {"attacks": ["forget", "int4"], "attack_steps": [0, 1, 3], "attack_rates": [1e-3]}
    table = tradeoff.attacked(summary(cells()) | {"experiment": about}, "make")
    assert (
        "| method | before | `forget` | `int4` |" in table
        and "| **routed with self-labels, ablated** | 5.00 | 3.50 | – |" in table
    )
    assert "| no attack | – |" in table and "within 3 steps of 16" in table

    attacks = [{"facts": row["attacks"]["forget"]} for row in cells()]
    rows = [row | {"attacks": one} for row, one in zip(cells(), attacks, strict=True)]
    about = {"attacks": ["facts"], "attack_steps": [0, 1, 3], "attack_rates": [1e-3]}
    table = tradeoff.facts(summary(rows) | {"experiment": about}, "make")
    assert "| method | facts left out: loss | … after the others | share relearned |" in table
    assert "| no routing | 3.00 | 2.80 | – | 3.00 | – |" in table and "| no attack |" in table
    assert (
        "| **routed with self-labels, ablated** | 5.00 | 3.50 | 75 % | 5.00 | – |" in table
        and "3 steps at most" in table
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch, without an accelerator
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    model, tokenizer = tiny_llama(max_length=256), byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for part in (model.bfloat16(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("path/or/hub-id", str(tmp_path / "base")), names)
    plain, info = AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert plain.config.to_dict().keys() == model.config.to_dict().keys() and plain.config.intermediate_size == 32
    assert not torch.equal(plain.model.embed_tokens.weight, model.model.embed_tokens.weight.float()), "it was trained"
    assert (tmp_path / "out" / "ablation.json").is_file() and (tmp_path / "run" / "forget").is_dir()
    assert [name for name, _ in names["model"].named_parameters() if "routed_down.forget" in name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch, without an accelerator
def test_the_example_of_several_regions_runs(tmp_path, monkeypatch):
    code = (ROOT / "docs/how-to-train-regions.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for part in (tiny_llama(max_length=256), tokenizer):
        part.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("path/or/hub-id", str(tmp_path / "base")), names)
    assert [entry for entry in names["trainer"].state.log_history if "train_loss" in entry]
    kept = {name.split(".")[-2] for name, _ in names["with_one_key"].named_parameters() if "routed_rows" in name}
    assert kept == {"cyber"} and (tmp_path / "run" / "bio").is_dir()


def test_the_tree_in_the_readme_names_all_that_is_there():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    column = tree.index("demo, test") - 1  # where the words begin
    named = set()
    for line in tree.strip().splitlines():
        folder = "routed_peft/" if line.startswith(" ") else ""
        named |= {folder + name for name in line[:column].split()}
    for name in named:
        assert (ROOT / name).exists() and (ROOT / name).is_dir() == name.endswith("/"), name
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a clone, which other files may lie in")
    files = [file for file in tracked.stdout.splitlines() if not file.startswith(".")]
    there = {f"{file.split('/')[0]}/" for file in files if "/" in file}
    parts = [file.split("/") for file in files if file.startswith("routed_peft/")]
    there |= {f"routed_peft/{name}{'/' if below else ''}" for _, name, *below in parts if below or name.endswith(".py")}
    assert there - {"routed_peft/__init__.py"} <= named


def test_every_file_of_the_library_opens_with_what_it_is_for():
    for path in (ROOT / "routed_peft").rglob("*.py"):
        assert path.read_text(encoding="utf-8").startswith(('"""', 'r"""')), path
