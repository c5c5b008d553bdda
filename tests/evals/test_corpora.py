from __future__ import annotations

import functools
import gzip
import importlib.util
import json
from collections import Counter
from importlib.resources import files
from types import ModuleType

import pytest
from places import ROOT

from routed_peft.corpora import PAIRS, SPLITS, load_pair, split_of
from routed_peft.corpora.arithmetic import EQUIVALENT, FACTS


@functools.cache
def frame(pair, split):
    return load_pair(pair, split).to_pandas()


@pytest.fixture(scope="module", params=PAIRS)
def splits(request):
    return {split: frame(request.param, split) for split in SPLITS}


@pytest.mark.slow
def test_splits_are_disjoint_and_of_the_promised_sizes(splits):
    ids = {split: set(rows["id"]) for split, rows in splits.items()}
    total = len(set().union(*ids.values()))
    assert sum(map(len, ids.values())) == total, "an id is in two splits"
    assert 0.035 < len(ids["test"]) / total < 0.045
    assert 0.015 < len(ids["validation"]) / total < 0.025


def test_rows_have_text_side_and_an_id_unique_per_side(splits):
    for rows in splits.values():
        assert list(rows.columns) == ["text", "side", "id"]
        assert set(rows["side"]) == {"forget", "retain"}
        assert rows["text"].str.strip().astype(bool).all()
        assert not rows.duplicated(["side", "id"]).any()


def test_there_is_enough_text_to_train_on():
    """At 2,048 entries of BPE a token is about 3.3 characters of these texts: 1.2M tokens are about 4M characters."""
    for name in ("biology", "spanish"):
        train = frame(name, "train")
        characters = train.groupby("side")["text"].apply(lambda texts: texts.str.len().sum())
        assert (characters > 3_300_000).all(), characters


def test_a_test_verse_is_not_in_train_in_the_other_language():
    train, test = (frame("spanish", split) for split in ("train", "test"))
    assert not set(train["id"]) & set(test["id"])
    both = test.groupby("id")["side"].nunique()
    assert (both == 2).all()


def test_general_wordnet_has_no_biology_and_serves_two_pairs():
    biology, entangled = (frame(name, "test") for name in ("biology", "entangled"))
    retain = biology[biology["side"] == "retain"].reset_index(drop=True)
    assert retain.equals(entangled[entangled["side"] == "retain"].reset_index(drop=True))
    domains = {id.split("/")[0] for id in retain["id"]}
    assert not domains & {"noun.animal", "noun.plant", "noun.body"}
    forget = entangled[entangled["side"] == "forget"]["id"]
    assert {id.split("/")[0] for id in forget} == {"noun.animal", "noun.plant", "noun.body"}


def test_sums_are_right_and_their_lines_new_in_every_split():
    test, train = frame("arithmetic", "test"), frame("arithmetic", "train")
    assert not set(test["text"]) & set(train["text"])
    for line in test["text"]:
        for fact in line.split("; "):
            left, right = fact.translate(str.maketrans({"×": "*", "÷": "/", "−": "-"})).split("=")
            assert eval(left) == int(right), fact  # noqa: S307
    assert {fact for line in train["text"] for fact in line.split("; ")} == {
        f for facts in FACTS.values() for f in facts
    }
    for corpus, groups in EQUIVALENT.items():
        assert {fact for group in groups for fact in group} == set(FACTS[corpus])
        assert sum(len(set(group)) for group in groups) == len(set(FACTS[corpus])), "each fact once"


def test_the_first_rows_are_a_sample_rather_than_the_start_of_an_alphabet():
    first = load_pair("biology", "test")["text"][:40]
    assert len({text[0].lower() for text in first}) > 8


def test_order_and_split_are_fixed():
    assert load_pair("spanish", "test")["id"][:] == frame("spanish", "test")["id"].tolist()
    assert Counter(split_of(f"Gen 1:{i}") for i in range(1, 32)) == {"train": 29, "test": 2}


@pytest.mark.parametrize(("arguments", "message"), [(("physics",), "`name`.*biology"), (("biology", "dev"), "`split`")])
def test_unknown_names_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pair(*arguments)


def test_every_file_has_its_notice_and_the_licence_is_kept():
    folder = files("routed_peft.corpora")
    notice = folder.joinpath("NOTICE.md").read_text(encoding="utf-8")
    packed = [entry for entry in folder.iterdir() if entry.name.endswith(".jsonl.gz")]
    shipped = {corpus for pair in PAIRS.values() for corpus in (pair.forget, pair.retain)} - set(FACTS)
    assert {f"{corpus}.jsonl.gz" for corpus in shipped} == {entry.name for entry in packed}
    assert all(f"`{entry.name}`" in notice for entry in packed)
    for words in ("Permission to use, copy, modify and distribute this software", "CC BY 4.0", "2022-07", "trademark"):
        assert words in notice
    assert sum(len(entry.read_bytes()) for entry in packed) < 6e6


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_corpora", ROOT / "recipes" / "build_corpora.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_script_keeps_what_is_asked_about_and_repeats_itself(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "GENE_ONTOLOGY_ROWS", 3)
    monkeypatch.setattr(build, "WORDNET_GENERAL_ROWS", 2)
    word = lambda word, domain: {"word": word, "domain": domain, "gloss": f"a {word}", "examples": []}
    sources = {
        "bible_en_es": [{"ref": "Gen 1:1", "en": "In the", "es": "En él"}],
        "gene_ontology": [{"id": f"GO:{i}", "term": f"t{i}", "def": "d", "virus": i == 7} for i in range(9)],
        "wordnet_glosses": [word("cat", "noun.animal"), *(word(w, "noun.act") for w in "abcdea")],
        "go_mcq": [{"question": "", "choices": ["t1", "t5"], "answer": 1}],
        "wordnet_mcq": [{"question": "Which word means: a e?", "choices": ["e", "b"], "answer": 0}],
    }
    for name, rows in sources.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    out = build.slices(tmp_path)
    assert {"GO:5", "GO:7"} < {row["id"] for row in out["gene_ontology"]} and len(out["gene_ontology"]) == 3
    assert {"id": "noun.act/5", "text": "e: a e"} in out["wordnet_general"] and len(out["wordnet_general"]) == 2
    assert out["wordnet_biology"] == [{"id": "noun.animal/1", "text": "cat: a cat"}]
    assert out["bible_es"] == [{"id": "Gen 1:1", "text": "En él"}]
    first, second = (build.write(tmp_path / name, out["bible_es"]).read_bytes() for name in ("a.gz", "b.gz"))
    assert first == second and json.loads(gzip.decompress(first)) == out["bible_es"][0]
