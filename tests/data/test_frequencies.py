from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from routed_peft import presets
from routed_peft.data import (
    RoutedCollator,
    add_frequency_weights,
    labels_from_tokens,
    token_frequency_weights,
    tokens_of_words,
    train_tokenizer,
)

FORGET = ["the bird sat in the tree. ", "a tree and a tree "] * 200
RETAIN = ["the bird sat in the house. ", "a dog and a cat "] * 200
TOKENIZER = train_tokenizer(FORGET + RETAIN, vocab_size=290)


def test_the_rule_by_hand():
    """Two tokens, counted by hand: f = (a + 1) / (N + V), r = (b + 20) / (M + 20 V)."""
    tokenizer = train_tokenizer(["x"], vocab_size=258)
    size, (p, q) = len(tokenizer), tokenizer.convert_tokens_to_ids(["p", "q"])
    w = token_frequency_weights(tokenizer, ["p" * 900 + "q" * 100], retain_texts=["p" * 100, "q" * 300])
    for token, a, b in ((p, 900, 100), (q, 100, 300)):
        f, r = (a + 1) / (1000 + size), (b + 20) / (400 + 20 * size)
        expected = 1 - torch.sigmoid(torch.tensor(1.0 * (f / r - r / f) - 4.0))
        torch.testing.assert_close(w[token], expected)
    assert w.shape == (size,) and w.dtype == torch.float32 and ((w >= 0) & (w <= 1)).all()


def test_an_equally_common_token_passes_and_a_forget_word_does_not():
    w = token_frequency_weights(TOKENIZER, FORGET * 20, retain_texts=RETAIN * 20)
    assert tokens_of_words(TOKENIZER, ["tree"]) == TOKENIZER.convert_tokens_to_ids(["Ġtree"])
    tree, the = TOKENIZER.convert_tokens_to_ids(["Ġtree", "Ġthe"])
    assert w[tree] < 0.01
    assert 0.95 < w[the] < 0.99  # 0.982 but for the made-up counts


def test_weights_land_on_the_position_that_predicts_the_token():
    w = torch.tensor([0.982, 0.0, 0.5, 0.3])
    ds = Dataset.from_dict(
        {"input_ids": [[0, 1, 2, 3], [0, 1, 2, 3], [1]], "route_label": ["forget", "retain", "forget"]}
    )
    out = add_frequency_weights(ds, w, base_weight=-0.75)["route_weights"][:]
    effective = [-0.75 * m for m in out[0]["base"]]
    assert effective == pytest.approx([-0.75, 0.5 - 0.5 * 0.75, 0.3 - 0.7 * 0.75, -0.75])
    assert out[1]["base"] == [1.0] * 4 and out[2]["base"] == [1.0]


@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.integers(0, 9), min_size=2, max_size=12),
    base=st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3),
    seed=st.integers(0, 9),
)
def test_multiplier_times_route_weight_is_the_base_weight(ids, base, seed):
    w = torch.rand(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ds = Dataset.from_dict({"input_ids": [ids], "route_label": ["bio"]})
    if all(w[i] >= 0.5 for i in ids[1:]):
        with pytest.raises(ValueError, match="nothing would be routed"):
            add_frequency_weights(ds, w, base_weight=base, label="bio")
        return
    row = add_frequency_weights(ds, w, base_weight=base, label="bio")[0]["route_weights"]["base"]
    for position, token in enumerate(ids[1:]):
        assert row[position] * base == pytest.approx(w[token].item() + (1 - w[token].item()) * base)
    assert len(row) == len(ids) and row[-1] == 1


def test_it_passes_through_the_collator():
    ds = Dataset.from_dict({"input_ids": [[0, 1, 0], [0, 1]], "route_label": ["forget", "retain"]})
    out = add_frequency_weights(ds, torch.tensor([1.0, 0.0]), base_weight=-0.5)
    batch = RoutedCollator(TOKENIZER, presets.era(base_weight=-0.5))(list(out))
    assert batch["route_weights"]["base"].tolist() == [[1.0, -2.0, 1.0], [1.0, 1.0, 1.0]]
    stream = list(add_frequency_weights(ds.to_iterable_dataset(), torch.tensor([1.0, 0.0]), base_weight=-0.5))
    assert [row["route_weights"] for row in stream] == out["route_weights"][:]


def test_errors():
    ds = Dataset.from_dict({"input_ids": [[0, 5]], "route_label": ["forget"]})
    with pytest.raises(ValueError, match="`base_weight` must be a finite number other than 0"):
        add_frequency_weights(ds, torch.zeros(9), base_weight=0.0)
    with pytest.raises(ValueError, match="weights for 3 tokens, got token 5"):
        add_frequency_weights(ds, torch.zeros(3), base_weight=-0.75)
    with pytest.raises(ValueError, match="labeled 'flagged'.*nothing would be routed"):
        add_frequency_weights(ds, torch.zeros(9), base_weight=-0.75, label="flagged")
    with pytest.raises(ValueError, match="no token of `forget_texts` is routed"):
        token_frequency_weights(TOKENIZER, RETAIN, retain_texts=RETAIN)
    with pytest.raises(ValueError, match="must both hold tokens, got 0 and"):
        token_frequency_weights(TOKENIZER, [], retain_texts=RETAIN)
    with pytest.raises(ValueError, match="must be positive"):
        token_frequency_weights(TOKENIZER, FORGET, retain_texts=RETAIN, retain_count=0)
    with pytest.raises(ValueError, match="'elephant' is no single token"):
        tokens_of_words(TOKENIZER, ["tree", "elephant"])


def test_words_have_all_the_forms_that_are_single_tokens():
    tokenizer = train_tokenizer(["tree tree Tree Tree " * 50, "tree", "Tree\n" * 9], vocab_size=280)
    found = tokenizer.convert_ids_to_tokens(tokens_of_words(tokenizer, ["tree"]))
    assert set(found) == {"tree", "Tree", "Ġtree", "ĠTree"}


def test_a_list_without_leading_spaces_raises_rather_than_route_nothing():
    ds = Dataset.from_dict({"input_ids": TOKENIZER([" a tree", " the tree"])["input_ids"]})
    bare = TOKENIZER("t")["input_ids"]
    with pytest.raises(ValueError, match="leading spaces"):
        labels_from_tokens(ds, {"forget": bare})
    out = labels_from_tokens(ds, {"forget": tokens_of_words(TOKENIZER, ["tree"])})
    assert out["route_labels"][:] == [["unlabeled", "forget"]] * 2
