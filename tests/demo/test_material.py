from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_parts import TINY

from routed_peft.demo import ARMS
from routed_peft.demo.material import Material, tokens_by_side


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material.prepare(TINY, tmp_path_factory.mktemp("material") / "data")


@pytest.mark.slow
def test_runs_of_all_arms_are_equally_long_and_drop_what_they_should(material):
    runs = {arm.key: material.run_of(arm, TINY) for arm in ARMS}
    assert {len(run) for run in runs.values()} == {80}
    assert "forget" not in runs["filter"]["route_label"] and "forget" in runs["filter"]["side"]
    assert "forget" not in runs["perfect_filter"]["side"]
    assert {runs["routed"][i]["route_label"] for i in range(24)} == {"forget", "retain"}  # labeled rows come first
    assert tokens_by_side(runs["perfect_filter"], 32) == {"forget": 0, "retain": 80 * 32}


@pytest.mark.slow
def test_the_attacker_has_no_document_that_is_trained_or_tested_on(material):
    from routed_peft.corpora import load_pair

    assert len(material.attacker) == TINY.relearn_documents
    others = {*load_pair("biology", "train")["text"], *load_pair("biology", "test")["text"]}
    tested = [json.loads(line)["text"] for line in Path(material.files["forget_file"]).read_text().splitlines()]
    assert set(tested) <= others and not set(material.attacker) & set(tested)
