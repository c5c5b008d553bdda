from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from demo_parts import TINY as DEMO
from filelock import FileLock
from places import ROOT
from transformers import AutoModelForCausalLM

from experiments.common.cells import agree, plain, write_json
from experiments.common.engine import SummaryFile
from experiments.removal import METHODS, Experiment, MethodCell, Settings, all_cells, cells, run, run_experiment
from experiments.removal import derive_cell as changing
from experiments.removal import train_cell as making
from experiments.removal.material import run_of
from experiments.removal.methods import (
    COHERENCE_RATES,
    COHERENCE_STEPS,
    UNLEARNING,
    tfidf_balanced,
    tfidf_labels,
    tfidf_overrule,
)
from experiments.removal.run import Removal
from experiments.report.reading import read_sources
from routed_peft.checkpoint import load_routed
from routed_peft.corpora import load_pair
from routed_peft.corpora.arithmetic import FACTS
from routed_peft.demo.material import Material
from routed_peft.evaluation.relearning import Attack
from routed_peft.unlearning import UnlearningArguments

TINY = Settings(**vars(DEMO))
CONFIGS = ROOT / "recipes" / "configs"
RESULTS = CONFIGS.parent.parent / "results"


def experiment_of(place, **changes):
    settings = {
        "methods": ["routed", "control"],
        "seeds": [0],
        "attacks": ["few-shot-4"],
        "attack_rates": [1e-2],
        "attack_steps": [0, 1],
        "extensions": 0,
    }
    about = {"summary_file": str(place / "summary.json"), "cells_dir": str(place / "cells")}
    return Experiment(**{**about, **settings, **changes})


def experiment_in(asked):
    known = {field.name for field in fields(Experiment)}
    experiment = Experiment(**{name: value for name, value in asked.items() if name in known})
    return experiment, Settings(**{name: value for name, value in asked.items() if name not in known})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("experiment")
    run_experiment(experiment_of(place), TINY)
    return place


@pytest.fixture
def calls(monkeypatch):
    """Cells that are made and attacked, in order; the real work is done as well."""
    found: list[str] = []
    for name in ("make", "attack"):
        real = getattr(run, name)

        def spy(cell, site, _kind=name, _real=real, **about):
            found.append(f"{_kind} {cell.name}")
            return _real(cell, site, **about)

        monkeypatch.setattr(run, name, spy)
    return found


def test_the_summary_has_every_cell_and_can_be_reported(finished):
    (source,) = read_sources([finished / "summary.json"])
    cells = {cell["method"]: cell for cell in source.summary["cells"]}
    assert list(cells) == ["routed", "control"], "a parent that was not asked for is made, and not shown"
    assert cells["routed"]["labeled"] == 0.5 and cells["control"]["labeled"] is None
    assert {"found_precision", "region_on_forget_loss", "validation_forget_loss"} <= cells["routed"].keys()
    for cell in cells.values():
        (curve,) = cell["attacks"]["few-shot-4"]
        assert curve["steps"] == [0, 1] and len(curve["forget_losses"]) == 2


def test_what_a_cell_says_of_its_documents_and_its_region(finished):
    cell = json.loads((finished / "summary.json").read_text())["cells"][0]
    for side in ("forget", "retain"):
        low, high = cell[f"{side}_loss_interval"]
        assert low < cell[f"{side}_loss"] < high
    assert len(cell["region_activity_ratio"]) == TINY.layers and all(
        ratio > 0 for ratio in cell["region_activity_ratio"]
    )


def test_attacks_on_facts_score_the_other_half_and_those_on_logits_have_rates_of_their_own(finished):
    attacks = ["facts", "bias+few-shot-4"]
    run_experiment(experiment_of(finished, summary_file=str(finished / "more.json"), attacks=attacks), TINY)
    cell = json.loads((finished / "more.json").read_text())["cells"][0]
    (facts,) = cell["attacks"]["facts"]
    assert facts["learning_rate"] == 1e-2 and facts["forget_losses"][0] != pytest.approx(cell["forget_loss"], abs=1e-6)
    assert facts["forget_losses"][0] == pytest.approx(cell["forget_loss"], rel=0.1), "other documents of the same kind"
    assert {curve["learning_rate"] for curve in cell["attacks"]["bias+few-shot-4"]} >= {1e-2, 1e-1}


def test_a_finished_experiment_makes_nothing_again(finished, calls):
    before = (finished / "summary.json").read_bytes()
    run_experiment(experiment_of(finished), TINY)
    assert not calls
    command = json.loads(before)["command"]
    assert json.loads((finished / "summary.json").read_bytes()) == {**json.loads(before), "command": command}


def test_without_the_cells_it_goes_on_from_the_summary(finished, tmp_path, calls):
    shutil.copy(finished / "summary.json", tmp_path)
    run_experiment(experiment_of(tmp_path), TINY)
    assert not calls
    then, now = (json.loads((place / "summary.json").read_text()) for place in (finished, tmp_path))
    assert now["cells"] == then["cells"] and now["versions"] == then["versions"]


def test_what_is_there_is_collected_and_nothing_made(finished, tmp_path, calls, monkeypatch):
    there = dict(cells_dir=str(finished / "cells"), summary_file=str(tmp_path / "summary.json"))
    monkeypatch.setattr(sys, "argv", ["recipes/experiment.py", "--collect", "true", "--config", "my.yaml"])
    run_experiment(experiment_of(finished, **there, methods=["routed", "control", "filter"], collect=True), TINY)
    then, now = (json.loads((place / "summary.json").read_text()) for place in (finished, tmp_path))
    assert not calls and now["cells"] == then["cells"] and now["experiment"]["collect"] is False
    assert now["command"] == "python recipes/experiment.py --config my.yaml"  # which makes them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda summary: summary | {"format": 2},
            "has the format 2, this version of routed_peft reads 1: move it away",
        ),
        (lambda summary: {"rows": []}, "is no summary of an experiment"),
    ],
)
def test_a_summary_of_another_kind_or_version_is_refused_and_kept(finished, tmp_path, calls, change, message):
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(change(json.loads((finished / "summary.json").read_text()))))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        run_experiment(experiment_of(tmp_path), TINY)
    assert not calls and file.read_bytes() == before


def alone(file, method):
    """Leave one method in a summary."""
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"cells": [row for row in summary["cells"] if row["method"] == method]}))


def test_rows_that_are_not_asked_for_stay_where_the_same_settings_make_them(finished, tmp_path, calls):
    file = Path(shutil.copy(finished / "summary.json", tmp_path))
    before = json.loads(file.read_text())
    run_experiment(experiment_of(tmp_path, methods=["control"]), TINY)
    after = json.loads(file.read_text())
    assert not calls and sorted(after["cells"], key=str) == sorted(before["cells"], key=str)
    with pytest.raises(
        ValueError, match=r"holds 1 rows that are not asked for, with `attack_rates` \[0.01\] where \[0.02\]"
    ):
        run_experiment(experiment_of(tmp_path, methods=["control"], attack_rates=[2e-2]), TINY)
    run_experiment(experiment_of(tmp_path, methods=["control"]), replace(TINY, robust_share=0.3))
    left = json.loads(file.read_text())["cells"]
    assert [row["method"] for row in left] == ["control"], "other settings do not make the routed one"
    file.write_text(json.dumps(before))
    run_experiment(experiment_of(tmp_path, methods=["control"], collect=True), TINY)
    assert [row["method"] for row in json.loads(file.read_text())["cells"]] == ["control"] and not calls


def test_a_parent_that_was_made_again_for_its_child_is_attacked_again(finished, tmp_path, calls):
    """Its model was gone, and what it is now may differ from the one that the attacks of the summary were on."""
    run_experiment(experiment_of(tmp_path, methods=["no_routing"], cells_dir=str(finished / "cells")), TINY)
    calls.clear()
    run_experiment(experiment_of(tmp_path, methods=["no_routing", "control"]), TINY)
    assert calls == ["make no_routing", "make control", "attack control", "attack no_routing"]
    rows = json.loads((tmp_path / "summary.json").read_text())["cells"]
    assert [list(row["attacks"]) for row in rows] == [["few-shot-4"]] * 2


def test_a_cell_that_another_process_makes_is_not_restored(finished, tmp_path):
    shutil.copy(finished / "summary.json", tmp_path)
    design = Removal(experiment_of(tmp_path), TINY)
    first, second = design.cells
    with FileLock(f"{design.store.claim(first)}.lock"):
        SummaryFile(design, design.store, file=tmp_path / "summary.json").restore()
    assert design.store.numbers(first) is None and design.store.is_done(second)


def test_of_rows_that_share_a_cell_the_one_that_was_attacked_is_taken(finished, tmp_path, calls):
    """Routed without labels is the placebo; a sweep over the placebo alone left its row as it was."""
    file = Path(shutil.copy(finished / "summary.json", tmp_path))
    summary = json.loads(file.read_text())
    (row,) = (row for row in summary["cells"] if row["method"] == "control")
    older = row | {"method": "routed", "labeled": 0.0, "recall": 1.0, "precision": 1.0, "attacks": {}}
    file.write_text(json.dumps(summary | {"cells": [row, older]}))
    run_experiment(experiment_of(tmp_path, methods=["control", "routed"], labeled_shares=[0.0], collect=True), TINY)
    rows = json.loads(file.read_text())["cells"]
    assert [list(row["attacks"]) for row in rows] == [["few-shot-4"]] * 2 and not calls
    file.write_text(json.dumps(summary | {"cells": [row, older]}))
    run_experiment(experiment_of(tmp_path, methods=["control"], labeled_shares=[0.0]), TINY)
    own, other = json.loads(file.read_text())["cells"]
    assert other == own | {name: older[name] for name in ("method", "labeled", "recall", "precision")}, (
        "its row follows"
    )


def test_a_new_attack_needs_the_model_again(finished, tmp_path, calls):
    alone(Path(shutil.copy(finished / "summary.json", tmp_path)), "routed")
    run_experiment(experiment_of(tmp_path, attack_rates=[2e-2], methods=["routed"]), TINY)
    assert calls == ["make routed", "attack routed"]
    then, now = (json.loads((place / "summary.json").read_text()) for place in (finished, tmp_path))
    assert now["cells"][0]["forget_loss"] == then["cells"][0]["forget_loss"], "the same numbers, made anew"
    assert now["cells"][0]["attacks"]["few-shot-4"][0]["learning_rate"] == 2e-2


def test_attackers_may_have_the_documents_that_were_trained_on(finished, tmp_path, monkeypatch):
    def texts(*args, **kwargs):
        found.append(kwargs["data"].forget_train)
        return relearn(*args, **kwargs)

    found, relearn = [], making.relearn
    monkeypatch.setattr(making, "relearn", texts)
    before = {*(finished / "cells").glob("*control*/attack-*.json")}
    for split in ("validation", "train"):
        experiment = experiment_of(finished, attack_split=split, attack_steps=[0], methods=["control"])
        run_experiment(replace(experiment, summary_file=str(tmp_path / f"{split}.json")), TINY)
    held_out, trained_on = ({*load_pair(TINY.pair, split)["text"]} for split in ("validation", "train"))
    assert {*found[0]} <= held_out and {*found[1]} <= trained_on and found[0] != found[1]
    assert len({*(finished / "cells").glob("*control*/attack-*.json")} - before) == 2, "neither is taken for the other"
    with pytest.raises(ValueError, match="`attack_split` must be one of validation, train, got 'test'"):
        experiment_of(tmp_path, attack_split="test")


def test_a_child_makes_the_model_of_its_parent_again(finished, tmp_path, calls):
    shutil.copy(finished / "summary.json", tmp_path)
    experiment = experiment_of(tmp_path, methods=["routed", "control", "random_units"], attacks=[])
    run_experiment(experiment, TINY)
    assert calls == ["make no_routing", "make random_units"]


def test_a_model_that_came_out_the_same_keeps_its_attacks(finished, tmp_path, calls):
    shutil.copy(finished / "summary.json", tmp_path)
    run_experiment(experiment_of(tmp_path, methods=["routed"]), TINY)
    folder = tmp_path / "cells" / "biology-routed-0.5-0"
    (attack,) = folder.glob("attack-*.json")
    attack.unlink()
    run_experiment(experiment_of(tmp_path, methods=["routed"]), TINY)
    assert attack.exists() and not calls, "as in the summary"
    attack.unlink()
    numbers = json.loads((folder / "numbers.json").read_text())
    (folder / "numbers.json").write_text(json.dumps({**numbers, "forget_loss": numbers["forget_loss"] + 1e-9}))
    run_experiment(experiment_of(tmp_path, methods=["routed"]), TINY)
    assert calls == ["make routed", "attack routed"], "another model wants attacks of its own"


def test_undo_is_made_from_what_was_unlearned_and_costs_add_up(finished):
    tiny = replace(TINY, pair="arithmetic", vocab_size=300)
    experiment = Experiment(
        str(finished / "undo.json"), str(finished / "undo"), ["maxent", "undo-0.4", "routed_undo"], [0], [1.0]
    )
    run_experiment(experiment, tiny)
    cells = {cell["method"]: cell for cell in json.loads((finished / "undo.json").read_text())["cells"]}
    assert "forget_accuracy" not in cells["maxent"], "there are no questions about sums"
    made = cells["undo-0.4"]["undo"]
    assert made["alpha"] == 0.4 and made["beta"] == 0.1 and 0 < made["steps"] <= tiny.steps
    steps = {name: cell["ledger"]["serial_steps"] for name, cell in cells.items()}
    assert steps["maxent"] == tiny.steps + changing.UNLEARNING_STEPS
    assert steps["undo-0.4"] == steps["maxent"] + made["steps"]
    assert steps["routed_undo"] == tiny.steps + cells["routed_undo"]["undo"]["steps"]
    assert (
        cells["undo-0.4"]["ledger"]["labeled_forget_tokens"] == cells["maxent"]["ledger"]["labeled_forget_tokens"] > 0
    )


def test_a_cell_that_fails_is_named_at_the_end_and_the_others_are_made(finished, monkeypatch):
    real = run.make

    def make(cell, site):
        if cell.name == "filter":
            raise ValueError("no room")
        return real(cell, site)

    monkeypatch.setattr(run, "make", make)
    file = finished / "failed.json"
    methods = ["filter", "perfect_filter"]
    experiment = experiment_of(finished, summary_file=str(file), methods=methods, labeled_shares=[0.25], attacks=[])
    with pytest.raises(ValueError, match=r"1 of 2 cells failed(.|\n)*biology-filter-0.25-0, filter: no room"):
        run_experiment(experiment, TINY)
    assert [cell["method"] for cell in json.loads(file.read_text())["cells"]] == ["perfect_filter"]


def same(one, other):
    """Whether two cells have one model."""
    return one.directory == other.directory and one.depends_on() == other.depends_on()


def test_a_cell_knows_what_it_depends_on(monkeypatch):
    def cell(method, **changes):
        return MethodCell.from_method(method, replace(TINY, **changes))

    assert not same(cell("routed", robust_share=0.2), cell("routed"))
    assert not same(cell("routed", overrule=True), cell("routed"))
    assert same(cell("routed", relearn_steps=(0, 9)), cell("routed")), "the demo's own attack is no part of it"
    rmu = cell("rmu").depends_on()
    monkeypatch.setattr(cells, "UNLEARNING_STEPS", 50)
    assert not agree(cell("rmu").depends_on(), rmu), "unlearned in half of the steps"
    plain_cell = cell("no_routing")
    assert same(cell("no_routing", labeled=0.1, robust_share=0.2), plain_cell), "it looks at no labels"
    found = all_cells(Experiment("unused", methods=["no_routing", "filter"], labeled_shares=[0.1, 0.5]), TINY)
    assert len(found) == 3 * (1 + 2), "what ignores labels is made once a seed"
    assert same(cell("filter", labeled=1.0), cell("perfect_filter")), "one directory for two rows"
    assert same(cell("filter", labeled=0.0), plain_cell) and same(cell("npo", labeled=0.0), plain_cell), (
        "nothing to filter or unlearn"
    )
    assert same(cell("routed", labeled=0.0), cell("control")) and not same(cell("control"), plain_cell)
    with pytest.raises(ValueError, match=r"`methods` has 'undo-0.4' and `labeled_shares` has 0"):
        cell("undo-0.4", labeled=0.0)
    some = all_cells(Experiment("unused", methods=["undo-0.4"], labeled_shares=[0.0, 0.5], seeds=[0]), TINY)
    assert [cell.settings.labeled for cell in some] == [0.5], "the others can be made"
    assert not same(cell("filter", labeled=1.0, recall=0.9), cell("perfect_filter"))
    assert len(all_cells(Experiment("unused", methods=["perfect_filter", "filter"], labeled_shares=[1.0]), TINY)) == 6


def test_settings_hold_rates_weights_and_what_the_model_is_made_from(monkeypatch):
    names = ("maxent", "gradient_ascent", "undo-0.6", "routed_undo", "classifier_filter")
    before = {name: MethodCell.from_method(name, TINY).depends_on() for name in names}
    changed = {name: replace(METHODS[name], rates=(1.0,)) for name in ("maxent", "gradient_ascent")}
    monkeypatch.setattr(cells, "METHODS", METHODS | changed)
    after = {name: MethodCell.from_method(name, TINY).depends_on() for name in names}
    assert [n for n in names if not agree(before[n], after[n])] == ["maxent", "gradient_ascent", "undo-0.6"]
    assert not agree(
        MethodCell.from_method("routed_undo", replace(TINY, robust_share=0.2)).depends_on(), after["routed_undo"]
    )
    asked = MethodCell.from_method("routed_undo:robust_share=0.2", TINY)
    assert same(asked.parent, MethodCell.from_method("routed:robust_share=0.2", TINY)), "its teacher"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("experiment_*.yaml")), ids=lambda file: file.stem)
def test_shipped_experiments_can_start(config):
    asked = yaml.safe_load(config.read_text())
    if "labeled_shares" not in asked:
        pytest.skip("an experiment of another kind")
    experiment, settings = experiment_in(asked)
    assert {cell.shown for cell in all_cells(experiment, settings)} == set(experiment.methods)


@pytest.mark.parametrize("name", [file.stem for file in sorted(RESULTS.glob("*.json")) if "cells" in file.read_text()])
def test_shipped_results_are_restored_by_the_experiments_as_they_stand(name, tmp_path):
    asked = yaml.safe_load((CONFIGS / f"experiment_{name}.yaml").read_text())
    if "labeled_shares" not in asked:
        pytest.skip("an experiment of another kind")
    experiment, settings = experiment_in(asked | {"cells_dir": str(tmp_path)})
    design = Removal(experiment, settings)
    summary = SummaryFile(design, design.store, file=RESULTS / f"{name}.json")
    assert not summary.further_rows(), "all rows are asked for"
    summary.restore()
    there = json.loads((RESULTS / f"{name}.json").read_text())["cells"]
    found = {json.dumps(plain(cell.row)): cell for cell in design.cells}
    for row in there:
        cell = found[json.dumps({name: row[name] for name in ("method", "seed", "labeled", "recall", "precision")})]
        numbers = design.store.numbers(cell)
        assert numbers is not None and numbers["forget_loss"] == row["forget_loss"]
        assert row["attacks"].items() <= design.store.attacks(cell).items()


def test_output_based_methods_have_the_weights_of_their_recipes():
    for name, (weights, _) in UNLEARNING.items():
        recipe = yaml.safe_load((CONFIGS / f"unlearn_{name}.yaml").read_text())
        said = {key: recipe[key] for key in ("alpha", "beta", "retain_loss") if key in recipe}
        own = UnlearningArguments("unused", method=name, use_cpu=True, **weights)
        assert {key: getattr(own, key) for key in said} == said, name


def test_a_classifier_keeps_the_labels_that_were_given():
    texts = ["a cell divides", "the cell wall", "a king rules", "the king speaks"] * 3
    odd = ["retain", "forget", "retain", "retain", *["unlabeled"] * 8]  # the first is wrong
    ds = tfidf_labels(Dataset.from_dict({"text": texts, "route_label": odd}))
    assert ds["route_label"][:4] == odd[:4] and set(ds["route_label"][:]) == {"forget", "retain"}


def test_a_balanced_classifier_finds_the_rare_side():
    """Where one side is rare, a probability of one half is seldom passed; so many deviations from either side's mean are."""
    rare, common = (
        ["a cell of the king", "the king of a cell"],
        ["a king rules", "the king speaks", "a law of the king"],
    )
    texts = rare * 5 + common * 40
    labels = ["forget"] * 5 + ["unlabeled"] * 5 + ["retain"] * 60 + ["unlabeled"] * 60
    ds = Dataset.from_dict({"text": texts, "route_label": labels})
    ds = ds.map(lambda row: {"text": row["text"].replace("cell", "word")} if row["route_label"] == "retain" else row)
    plain, balanced = (relabel(ds)["route_label"][:] for relabel in (tfidf_labels, tfidf_balanced))
    found = [sum(label == "forget" for label in labels[5:10]) for labels in (plain, balanced)]
    assert found[1] == 5 >= found[0] and balanced[:5] == ["forget"] * 5 and set(balanced[70:]) == {"retain"}


def test_a_classifier_may_overrule_the_labels_that_were_given():
    texts = ["a cell divides", "the cell wall", "a king rules", "the king speaks"] * 6
    labels = ["forget", "forget", "retain", "retain"] * 5 + ["unlabeled"] * 4
    labels[4] = "retain"  # of a cell
    ds = tfidf_overrule(Dataset.from_dict({"text": texts, "route_label": labels}))
    assert ds["route_label"][:] == ["forget", "forget", "retain", "retain"] * 6


def test_a_variant_changes_what_its_method_goes_by():
    with pytest.raises(
        ValueError, match="`methods`: 'filter:robust_share=0.2' changes `robust_share`, which 'filter' does"
    ):
        MethodCell.from_method("filter:robust_share=0.2", TINY)
    with pytest.raises(ValueError, match="'sgtm:forget_share=0.2' changes `forget_share`"):
        MethodCell.from_method("sgtm:forget_share=0.2", TINY)
    assert MethodCell.from_method("sgtm:region_size=8", TINY).settings.region_size == 8
    assert same(*(MethodCell.from_method("routed", replace(TINY, labeled=share)) for share in (1, 1.0)))


def test_a_filter_at_equal_retain_text_needs_to_know_how_much_that_is():
    settings = replace(TINY, forget_share=None)
    with pytest.raises(ValueError, match="`filter_equal_retain` needs a `forget_share`"):
        making.stretch(None, METHODS["filter"].arm, settings)


def test_facts_are_what_the_model_was_trained_on():
    facts = making.known_facts(Settings(pair="arithmetic"), ["3 × 4 = 12; 1 × 1 = 1"])
    assert ("3 × 4 = 12", "4 × 3 = 12", "12 ÷ 3 = 4", "12 ÷ 4 = 3") in facts and ("5 × 5 = 25", "25 ÷ 5 = 5") in facts
    assert {fact for group in facts for fact in group} == set(FACTS["multiplication"]) and len(facts) == 78
    trained = set(load_pair("biology")["text"][:])
    assert trained.issuperset(making.known_facts(Settings(limit=50), [])), "and not held-out documents"


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"losses": (1.0, float("nan")), "rate": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"losses": [1.0, None], "rate": None}


def test_token_weights_need_self_labels(tmp_path):
    settings = replace(TINY, self_labels=False, frequency_weights=True)
    with pytest.raises(ValueError, match="`frequency_weights` needs `self_labels`"):
        run_of(Material.prepare(TINY, tmp_path / "data"), METHODS["routed"].arm, settings)


def test_what_would_repeat_another_cell_has_none():
    def names(labeled_shares):
        methods = ["filter", "filter_equal_retain", "classifier_filter", "routed", "npo"]
        found = all_cells(Experiment("unused", methods=methods, labeled_shares=labeled_shares, seeds=[0]), TINY)
        return [[cell.shown for cell in found if cell.labels["labeled"] == share] for share in labeled_shares]

    assert names([0.0, 1.0]) == [["filter", "routed"], ["filter", "filter_equal_retain", "routed", "npo"]]


def test_forget_rows_may_teach_the_base_what_both_sides_share(tmp_path):
    methods = ["routed", "routed:frequency_weights=true"]
    run_experiment(experiment_of(tmp_path, methods=methods, attacks=[]), TINY)
    cells = json.loads((tmp_path / "summary.json").read_text())["cells"]
    assert [cell["method"] for cell in cells] == methods and cells[0]["retain_loss"] != cells[1]["retain_loss"]
    assert all(0 < cell["unlabeled_tokens_by_side"]["forget"] < cell["tokens_by_side"]["forget"] for cell in cells)


def test_a_variant_is_the_method_with_other_settings_of_routing():
    routed = MethodCell.from_method("routed", TINY)
    other = MethodCell.from_method("routed:robust_share=0.2,self_labels=false", TINY)
    assert same(other, MethodCell.from_method("routed", replace(TINY, robust_share=0.2, self_labels=False)))
    assert not same(other, routed)
    assert other.shown == "routed:robust_share=0.2,self_labels=false" and other.name == "routed"
    larger = MethodCell.from_method("routed:region_size=32", TINY)
    assert larger.settings.region_size == 32 and not same(larger, routed)
    filtered = (MethodCell.from_method("filter", replace(TINY, frequency_weights=on)) for on in (True, False))
    assert same(*filtered), "of routing alone"
    with pytest.raises(ValueError, match=r"a variant changes one of .*, got 'steps=3'"):
        MethodCell.from_method("routed:steps=3", TINY)
    with pytest.raises(ValueError, match="a variant is NAME=VALUE"):
        MethodCell.from_method("routed:self_labels=False", TINY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["forget", "fewshot-16"]}, "`fewshot-16` is no part of an attack"),
        ({"attack_steps": [1, 5]}, r"`attack_steps` must ascend from 0, got \[1, 5\]"),
        ({"attack_rates": [1e-3, 1e-3]}, "`attack_rates` must be different positive numbers"),
        ({"seeds": []}, "`seeds` must be different whole numbers, at least one"),
        ({"label_quality": ["0.9"]}, "`label_quality` takes RECALL/PRECISION, such as 0.9/0.8, got '0.9'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(changes, message):
    with pytest.raises(ValueError, match=message):
        Experiment("unused", **changes)


def test_an_attack_without_enough_text_is_refused_before_anything_is_made(tmp_path, calls):
    with pytest.raises(ValueError, match=r"few-shot-99999' trains on 99999 documents of `forget_train`"):
        run_experiment(experiment_of(tmp_path, attacks=["few-shot-99999"]), TINY)
    assert not calls


def test_attackers_have_text_that_is_of_neither_side():
    for pair in making.UNRELATED:
        settings = replace(TINY, pair=pair)
        data = making.attack_data(Attack.parse("unrelated"), settings, Experiment("unused"))
        assert data.unrelated_train and not {*data.unrelated_train} & {*data.retain_train, *data.forget_train}


def test_refuses_methods_that_do_not_exist():
    with pytest.raises(ValueError, match=r"`methods` has \['route'\]"):
        all_cells(Experiment("unused", methods=["route"]), TINY)
    assert set(METHODS) >= {"routed", "sgtm", "era", "control", "rmu"}


def test_a_region_that_leaves_was_paid_for_and_labels_are_those_that_somebody_gave(finished):
    methods = ["no_routing", "sgtm", "perfect_filter", "filter", "classifier_filter"]
    run_experiment(
        experiment_of(finished, summary_file=str(finished / "costs.json"), methods=methods, attacks=[]), TINY
    )
    ledgers = {cell["method"]: cell["ledger"] for cell in json.loads((finished / "costs.json").read_text())["cells"]}
    assert len({ledger["flops"] for ledger in ledgers.values()}) == 1, "same steps of models of the same size"
    labeled = {method: ledger["labeled_forget_tokens"] for method, ledger in ledgers.items()}
    assert labeled["filter"] == labeled["classifier_filter"] == labeled["sgtm"] > 0 == labeled["no_routing"]
    assert labeled["perfect_filter"] == pytest.approx(2 * labeled["filter"], rel=0.2), "TINY labels half"
    routed = json.loads((finished / "summary.json").read_text())["cells"][0]["ledger"]
    assert routed["flops"] > ledgers["sgtm"]["flops"], "scoring by the region costs, too"


def test_demix_drops_the_forget_expert_and_keeps_the_other(finished):
    run_experiment(experiment_of(finished, summary_file=str(finished / "demix.json"), methods=["demix"]), TINY)
    (cell,) = json.loads((finished / "demix.json").read_text())["cells"]
    plain = finished / "cells" / cell["key"] / "ablated"
    units = TINY.intermediate_size + TINY.region_size
    assert AutoModelForCausalLM.from_pretrained(plain).config.intermediate_size == units, (
        "as many as others have in use"
    )
    whole = load_routed(plain.parent / "run", ["forget", "retain"])
    assert whole.base_model.model.config.intermediate_size == TINY.intermediate_size // 12
    assert cell["region_on_forget_loss"] != cell["forget_loss"] and cell["attacks"]
    assert "validation_retain_loss" not in cell


def test_era_gets_its_coherence_back_from_retain_rows(finished):
    summary = finished / "era.json"
    run_experiment(experiment_of(finished, summary_file=str(summary), methods=["era", "era_coherent"]), TINY)
    ablated, coherent = json.loads(summary.read_text())["cells"]
    took = coherent["coherence"]
    assert took["learning_rate"] in COHERENCE_RATES and len(took["retain_losses"]) == COHERENCE_STEPS + 1
    assert 0 < took["best_step"] == took["retain_losses"].index(min(took["retain_losses"]))
    assert coherent["retain_loss"] < ablated["retain_loss"] and coherent["attacks"]
    assert coherent["ledger"]["flops"] > ablated["ledger"]["flops"]
    assert coherent["ledger"]["serial_steps"] == ablated["ledger"]["serial_steps"] + COHERENCE_STEPS
    assert coherent["ledger"]["labeled_forget_tokens"] == ablated["ledger"]["labeled_forget_tokens"]
    assert "tokens_by_side" not in coherent, "it was trained on more, and nobody knows on what"
    shares = experiment_of(finished, methods=["era", "era_coherent"], labeled_shares=[0.0, 1.0])
    assert [(c.shown, c.name) for c in all_cells(shares, TINY)] == [
        ("era", "control"), ("era", "era"), ("era_coherent", "era_coherent"),
    ], "nothing is routed without labels, so that nothing can be mended"  # fmt: skip


def test_rates_of_unlearning_are_said_to_be_best_within_their_grid_or_at_its_edge(finished):
    run_experiment(experiment_of(finished, summary_file=str(finished / "npo.json"), methods=["npo"], attacks=[]), TINY)
    (cell,) = json.loads((finished / "npo.json").read_text())["cells"]
    tried = cell["rates_tried"]
    assert set(tried) >= set(METHODS["npo"].rates) and cell["learning_rate"] in tried
    assert isinstance(cell["within_limit"], bool)
    assert cell["rate_interior"] == (min(tried) < cell["learning_rate"] < max(tried))
