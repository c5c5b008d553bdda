from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from evaluation_parts import byte_tokenizer
from relearning_parts import DATA, FORGET, RETAIN, tokenizer

from routed_peft.evaluation.relearning import (
    Attack,
    AttackData,
)
from routed_peft.evaluation.relearning.data import training_batches

TOKENIZER = tokenizer()


def test_facts_that_tell_each_other_are_not_parted():
    data = replace(DATA, facts=[tuple(f"{i} {word}" for word in ("and", "or")) for i in range(6)])
    for seed in range(5):
        halves = data.halves(seed)
        numbers = [{text.split()[0] for text in half} for half in halves]
        assert numbers[0].isdisjoint(numbers[1]) and [len(half) for half in halves] == [6, 6]
    assert (
        AttackData.without_overlap(forget_train=[], forget_test=["0 and"], retain_test=["a"], facts=data.facts).facts
        == data.facts[1:]
    )


def tokens_of(batch):
    ids, mask, targets = batch
    return [row[keep.bool()].tolist()[1:] for row, keep in zip(ids, mask, strict=True)], targets


def test_batches_are_what_the_attack_says():
    mixed = next(training_batches(TOKENIZER, [FORGET, RETAIN], attack=Attack("m", data="mixed", batch_size=4), seed=0))
    known = [TOKENIZER.encode(text) for text in (*FORGET, *RETAIN)]
    rows, targets = tokens_of(mixed)
    assert [known.index(row) < len(FORGET) for row in rows] == [True, True, False, False]
    assert all(row[row >= 0][-1] == TOKENIZER.eos_token_id for row in targets)
    stream = training_batches(TOKENIZER, [FORGET], attack=Attack("f", batch_size=3), seed=0)
    order = [known.index(row) for _ in range(8) for row in tokens_of(next(stream))[0]]
    assert [sorted(order[i : i + 8]) for i in (0, 8, 16)] == [list(range(8))] * 3 and order[:8] != order[8:16]


def test_long_documents_become_rows_in_which_every_token_is_a_target_once():
    text = " ".join(FORGET)
    batch = next(training_batches(TOKENIZER, [[text]], attack=Attack("f", length=8, batch_size=64), seed=0))
    trained = [int(token) for row in batch[2] for token in row if token >= 0]
    assert trained == [*TOKENIZER.encode(text), TOKENIZER.eos_token_id] and batch[0].shape[1] == 7


def test_rows_of_a_tokenizer_that_begins_texts_all_begin():
    tokenizer, text = byte_tokenizer(adds_bos=True), " ".join(FORGET)
    ids, mask, targets = next(
        training_batches(tokenizer, [[text]], attack=Attack("f", length=8, batch_size=64), seed=0)
    )
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * len(ids) and ids.shape[1] == 7
    trained = [int(token) for row in targets for token in row if token >= 0]
    assert trained == [*tokenizer.encode(text)[1:], tokenizer.eos_token_id]
    assert (targets[1:, 0] < 0).all(), "no token in the middle of a document is predicted from its beginning"
    assert torch.equal(ids[1:, 2:][mask[1:, 2:].bool()], targets[1:, 1:-1][mask[1:, 2:].bool()])


def test_few_shots_are_drawn_by_the_seed():
    few = Attack.parse("few-shot-2")
    drawn = [DATA.for_training(few, seed)[0] for seed in range(5)]
    assert all(len(texts) == 2 and set(texts) <= set(DATA.forget_train) for texts in drawn)
    assert drawn[0] == DATA.for_training(few, 0)[0] and len({tuple(texts) for texts in drawn}) > 1


BAD_DATA = [
    ({"forget_train": FORGET}, "4 texts of `forget_test` are also in `forget_train`"),
    (
        {"forget_train": ["One. " + " ".join(FORGET) + " Two."], "forget_test": [" ".join(FORGET)]},
        "1 text of `forget_test` is also in `forget_train`, or within one of it",
    ),
    ({"retain_train": ["A  " + RETAIN[5][2:].upper()]}, "1 text of `retain_test` is also in `retain_train`"),
    ({"facts": FORGET[6:]}, "2 texts of `forget_test` are also in `facts`"),
    ({"facts": [("a", FORGET[6]), "b"]}, "1 text of `forget_test` is also in `facts`"),
    ({"forget_test": []}, "`forget_test` has no texts"),
    ({"forget_train": [12]}, "`forget_train` must be strings, got 12 of type int"),
    ({"facts": [("a", None)]}, "`facts` must be strings, got None"),
    ({"retain_test": []}, "`retain_test` has no texts"),
    ({"facts": ["a b", "a b"]}, "`facts` has texts twice"),
    ({"facts": ["a b", ("a c", "A  b")]}, "`facts` has texts twice"),
]


@pytest.mark.parametrize(("change", "message"), BAD_DATA)
def test_overlapping_and_empty_data_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttackData(**(vars(DATA) | change))
