"""The experiment *access*: every arm at a tiny size, and its numbers from made-up losses."""

from __future__ import annotations

import json

import pytest

from experiments.access import ARMS, Experiment, Settings, run_experiment
from experiments.access.material import core_of
from experiments.access.summary import columns_of, summarize

pytestmark = [pytest.mark.slow, pytest.mark.experiments]
TINY = {
    "steps": 4, "batch_size": 4, "layers": 1, "hidden_size": 32, "held_out": 4, "tokenizer_documents": 300, "vocab_size": 512,
    "region": {"size": 8, "r": 2, "embeddings": "full"},
}  # fmt: skip
SUBSETS = {"none", "biology", "spanish", "biology+spanish"}


def test_every_arm_is_made_measured_and_found_again(tmp_path):
    experiment = Experiment(output_dir=str(tmp_path / "run"), seeds=[3], split="validation")
    summary = run_experiment(experiment, Settings(**TINY))
    cells = {cell["arm"]: cell for cell in summary["cells"]}
    assert set(cells) == set(ARMS)
    for arm in ("routed", "silent_off", "units", "dense_regions", "branch"):
        assert set(cells[arm]["losses"]) == SUBSETS, arm
        assert all(set(row) == {"biology", "spanish", "core"} for row in cells[arm]["losses"].values())
    assert set(cells["one_topic"]["losses"]) == {"biology", "spanish"} and set(cells["core_only"]["losses"]) == {"none"}
    # at this length regions have learned little, but the base has no part of what they saw
    assert cells["routed"]["losses"]["none"] == pytest.approx(cells["silent_off"]["losses"]["none"])
    assert cells["branch"]["losses"]["none"] == pytest.approx(cells["core_only"]["losses"]["none"])
    made = (tmp_path / "run" / "cells").rglob("numbers.json")
    times = {file: file.stat().st_mtime_ns for file in made}
    again = run_experiment(experiment, Settings(**TINY))
    assert {file: file.stat().st_mtime_ns for file in times} == times and again["cells"] == summary["cells"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["checks"]


def made_up(**losses: tuple[float, float, float]) -> dict:
    names = ("bio", "spa", "core")
    table = {subset.replace("_", "+"): dict(zip(names, row, strict=True)) for subset, row in losses.items()}
    return {"losses": table, "ledger": {"flops": 110 if len(losses) > 1 else 100}}


def test_columns_mean_what_they_say():
    dense, filtered = made_up(all=(4.0, 4.0, 5.0)), made_up(none=(7.0, 8.0, 5.1))
    cell = made_up(none=(7.0, 6.0, 5.2), bio=(4.0, 5.5, 5.3), spa=(7.2, 5.0, 5.25), bio_spa=(4.3, 4.0, 5.4))
    found = columns_of(cell, dense, filtered)
    expected = {"removed": 0.75, "recovered": 0.75, "recovered, all on": 0.95, "tax": 0.1, "core, one on": 0.1,
                "core, all on": 0.2, "leak": 0.5, "compute": 1.1}  # fmt: skip
    assert found == pytest.approx(expected)
    assert columns_of(dense, dense, filtered) == {"compute": 1.0}


def test_a_summary_without_models_to_compare_with_has_empty_columns():
    cell = {"arm": "routed", "seed": 1, **made_up(none=(7.0, 6.0, 5.2), bio=(4.0, 5.5, 5.3), spa=(7.2, 5.0, 5.25),
                                                  bio_spa=(4.3, 4.0, 5.4))}  # fmt: skip
    summary = summarize([cell])
    assert not any(values for values in summary["rows"][0]["columns"].values())
    assert {check["holds"] for check in summary["checks"]} == {None}


def test_pairs_that_share_their_core_count_it_once():
    assert core_of(["biology", "entangled", "spanish"]) == {"wordnet_general": "biology", "bible_en": "spanish"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topics": ["biology", "biology"]}, "`topics`"),
        ({"share": 0.5}, "`topics`"),
        ({"topics": ["cooking"]}, "cooking"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
