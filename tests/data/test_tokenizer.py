from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routed_peft.data import train_tokenizer

TEXTS = ["one tree, two trees", "a cell divides"] * 3
TOKENIZER = train_tokenizer(TEXTS, vocab_size=270)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text or "<" in text
    assert all(0 <= i < len(TOKENIZER) for i in ids)


def test_special_tokens_come_first_and_the_end_begins_a_sequence():
    assert (TOKENIZER.pad_token, TOKENIZER.pad_token_id) == ("<pad>", 0)
    assert (TOKENIZER.eos_token, TOKENIZER.eos_token_id) == ("<eos>", 1)
    assert TOKENIZER.bos_token_id == TOKENIZER.eos_token_id
    assert TOKENIZER("a")["input_ids"] == TOKENIZER("a", add_special_tokens=False)["input_ids"], "none is added unasked"


def test_the_same_texts_give_the_same_tokenizer_with_merges_up_to_the_size_asked_for():
    again = train_tokenizer(TEXTS, vocab_size=270)
    assert again.get_vocab() == TOKENIZER.get_vocab() and len(again) == 270
    assert len(TOKENIZER("tree")["input_ids"]) < len("tree"), "merges were learned"
    least = train_tokenizer(["tree"], vocab_size=258)
    assert len(least) == 258 and len(least("tree")["input_ids"]) == 4, "no room for merges"


def test_too_few_entries_are_refused():
    with pytest.raises(ValueError, match=r"`vocab_size` must be at least 258 \(bytes and special tokens\), got 257"):
        train_tokenizer(TEXTS, vocab_size=257)
