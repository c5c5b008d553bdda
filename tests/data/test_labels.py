from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification, pipeline

from routed_peft.data import (
    labels_from_classifier,
    labels_from_column,
    labels_from_keywords,
    labels_from_tokens,
    train_tokenizer,
)

TEXTS = ["The old tree.", "A TREE fell", "street trees", "no wood here", "treetop"]
DS = Dataset.from_dict({"text": TEXTS, "topic": list("abcab"), "input_ids": [[1, 2, 3], [2], [3, 3], [], [4]]})


def test_columns_streaming_and_not():
    mapping = {"a": "forget", "b": "retain", "c": "unlabeled"}
    expected = ["forget", "retain", "unlabeled", "forget", "retain"]
    assert labels_from_column(DS, "topic", mapping)["route_label"][:] == expected
    assert [row["route_label"] for row in labels_from_column(DS.to_iterable_dataset(), "topic", mapping)] == expected
    again = labels_from_column(labels_from_column(DS, "topic", mapping), "route_label", {x: "core" for x in expected})
    assert set(again["route_label"]) == {"core"} and again["text"][:] == TEXTS


def test_class_label_columns_count_by_name():
    features = Features({"topic": ClassLabel(names=["law", "virology"])})
    ds = Dataset.from_dict({"topic": [1, 0, -1]}, features=features)
    mapping = {"virology": "forget", "law": "retain", None: "unlabeled"}
    for each in (ds, ds.to_iterable_dataset()):
        rows = list(labels_from_column(each, "topic", mapping))
        assert [row["route_label"] for row in rows] == ["forget", "retain", "unlabeled"]
    with pytest.raises(ValueError, match="None, which `mapping` lacks"):
        labels_from_column(ds, "topic", {"virology": "forget", "law": "retain"})


def test_column_errors():
    with pytest.raises(ValueError, match=r"lacks the columns \['subject'\], got"):
        labels_from_column(DS, "subject", {})
    with pytest.raises(ValueError, match="holds 'b', 'c', which `mapping` lacks"):
        labels_from_column(DS, "topic", {"a": "forget"})
    with pytest.raises(ValueError, match="which `mapping` lacks"):
        list(labels_from_column(DS.to_iterable_dataset(), "topic", {"a": "forget"}))


def test_keywords_are_whole_words_of_any_case():
    hits = lambda **options: [
        label == "forget"
        for label in labels_from_keywords(DS, {"forget": ["tree"]}, default="retain", **options)["route_label"]
    ]
    assert hits() == [True, True, False, False, False]
    assert hits(case_sensitive=True) == [True, False, False, False, False]
    assert hits(whole_words=False) == [True, True, True, False, True]
    stream = labels_from_keywords(DS.to_iterable_dataset(), {"forget": ["tree"]}, default="retain")
    assert [row["route_label"] == "forget" for row in stream] == hits()


def test_the_first_keyword_label_wins_and_words_are_not_patterns():
    ds = Dataset.from_dict({"text": ["a.b and tree", "axb tree", "C++ (new)"]})
    out = labels_from_keywords(ds, {"x": ["a.b"], "y": ["tree"], "z": ["C++"]}, default="none")
    assert out["route_label"][:] == ["x", "y", "z"]


@settings(max_examples=40, deadline=None)
@given(word=st.text(min_size=1, max_size=6).filter(str.strip), rest=st.text(max_size=10))
def test_any_keyword_is_found_as_a_word(word, rest):
    ds = Dataset.from_dict({"text": [f"{rest} {word} {rest}"]})
    assert (
        labels_from_keywords(ds, {"forget": [word]}, default="retain", case_sensitive=True)["route_label"][0]
        == "forget"
    )


def test_keyword_errors():
    with pytest.raises(ValueError, match=r"no keyword.*\['bio'\].*spelling"):
        labels_from_keywords(DS, {"forget": ["tree"], "bio": ["virus"]}, default="retain")
    with pytest.raises(ValueError, match="at least one word for 'forget'"):
        labels_from_keywords(DS, {"forget": []}, default="retain")
    with pytest.raises(ValueError, match="no empty ones"):
        labels_from_keywords(DS, {"forget": ["tree", " "]}, default="retain")
    with pytest.raises(ValueError, match="`keywords` is empty"):
        labels_from_keywords(DS, {}, default="retain")
    with pytest.raises(ValueError, match="lacks the columns"):
        labels_from_keywords(DS, {"forget": ["tree"]}, default="retain", column="body")


def test_token_labels():
    ds = DS.add_column("route_label", ["forget", "forget", "retain", "retain", "retain"])
    out = labels_from_tokens(ds, {"forget": [2, 3], "bio": [3, 4]}, default="retain")
    expected = [["retain", "forget", "forget"], ["forget"], ["forget", "forget"], [], ["bio"]]
    assert out["route_labels"][:] == expected and "route_label" not in out.column_names
    assert [row["route_labels"] for row in labels_from_tokens(ds.to_iterable_dataset(), {"forget": [2]})][1] == [
        "forget"
    ]
    inside = labels_from_tokens(ds, {"forget": [3]}, default="retain", within="forget")
    assert inside["route_labels"][:] == [["retain", "retain", "forget"], ["retain"], ["retain"] * 2, [], ["retain"]]
    with pytest.raises(ValueError, match=r"no token id.*\['forget'\].*leading spaces"):
        labels_from_tokens(ds, {"forget": [99]})


def score(texts: list[str]) -> list[float]:
    return [{0: 0.95, 1: 0.9, 2: 0.5, 3: 0.1, 4: 0.05}[TEXTS.index(text)] for text in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_thresholds_are_exclusive(batch_size):
    out = labels_from_classifier(DS, score, forget_above=0.9, retain_below=0.1, batch_size=batch_size)
    expected = ["forget", "unlabeled", "unlabeled", "unlabeled", "retain"]
    assert out["route_label"][:] == expected
    stream = labels_from_classifier(
        DS.to_iterable_dataset(), score, forget_above=0.9, retain_below=0.1, batch_size=batch_size
    )
    assert [row["route_label"] for row in stream] == expected
    tensor = lambda texts: torch.tensor(score(texts), dtype=torch.float64)
    assert labels_from_classifier(DS, tensor, forget_above=0.9, retain_below=0.1)["route_label"][:] == expected


@pytest.mark.parametrize(("above", "below"), [(0.1, 0.9), (1.1, 0.5), (0.5, -0.1), (float("nan"), 0.1)])
def test_bad_thresholds_raise(above, below):
    with pytest.raises(ValueError, match="0 <= `retain_below` <= `forget_above` <= 1"):
        labels_from_classifier(DS, score, forget_above=above, retain_below=below)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda texts: [0.5], r"got shape \(1,\) for 5 texts"),
        (lambda texts: np.full((5, 2), 0.5), r"got shape \(5, 2\)"),
        (lambda texts: [0.5, 0.5, float("nan"), 0, 1], "got nan"),
        (lambda texts: [0.5, 0.5, 3.2, 0, 1], "got 3.2.*sigmoid"),
    ],
)
def test_bad_scores_raise(scores, message):
    with pytest.raises(ValueError, match=message):
        labels_from_classifier(DS, scores, forget_above=0.9, retain_below=0.1)


def test_a_transformers_pipeline_scores_the_class_that_is_named():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, vocab_size=258)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        id2label={0: "SAFE", 1: "BIO"},
        label2id={"SAFE": 0, "BIO": 1},
    )
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight *= 200  # far from 0.5
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        bio = model(**inputs).logits.softmax(-1)[:, 1] > 0.5
    assert 0 < bio.sum() < 5
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    for positive, forget in (("BIO", bio), ("SAFE", ~bio)):
        out = labels_from_classifier(DS, pipe, forget_above=0.5, retain_below=0.5, positive=positive)
        assert out["route_label"][:] == ["forget" if hit else "retain" for hit in forget]
    for positive in (None, "bio"):
        with pytest.raises(ValueError, match=r"`positive` must name.*\['SAFE', 'BIO'\]"):
            labels_from_classifier(DS, pipe, forget_above=0.5, retain_below=0.5, positive=positive)


def test_words_are_looked_up_in_text_only():
    with pytest.raises(ValueError, match="values of the column `text` must be strings, got 12 of type int"):
        labels_from_keywords(Dataset.from_dict({"text": [12]}), {"forget": ["a"]}, default="retain")
