"""Labels of batches that any collator made."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, default_data_collator

from routed_peft.data import RoutedCollator, train_tokenizer
from routed_peft.data.labeled_batches import LabeledBatches, labeled_batches

ROUTES = {"forget": ..., "retain": ..., "unlabeled": ...}
NAMES = ["retain", "unlabeled", "forget"]  # another order than the routes'
TOKENIZER = train_tokenizer(["a"], vocab_size=258)
ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "route_label": "retain"},
    {"input_ids": [8, 9], "labels": [8, 9], "route_label": "forget"},
]
TOKENS = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "route_labels": ["retain", "forget", "retain"]},
    {"input_ids": [8, 9], "labels": [8, 9], "route_labels": ["unlabeled", "forget"]},
]
SIDES = {side: train_tokenizer(["a"], vocab_size=258) for side in ("left", "right")}
for side, tokenizer in SIDES.items():
    tokenizer.padding_side = side


def encoded(rows):
    """The same rows with integers, as `class_encode_column` makes them."""
    integers = [
        {name: NAMES.index(row[name]) for name in row if name == "route_label"}
        | {name: [NAMES.index(label) for label in row[name]] for name in row if name == "route_labels"}
        for row in rows
    ]
    return [row | own for row, own in zip(rows, integers, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [ROWS, TOKENS], ids=["row", "token"])
@pytest.mark.parametrize("encode", [list, encoded], ids=["names", "integers"])
def test_batches_of_any_collator_are_those_of_ours(side, rows, encode):
    weighed = [row | {"route_weights": {"base": [0.5] * len(row["input_ids"]), "forget": 2.0}} for row in rows]
    weighed = [row | {"route_environment": "lab"} for row in weighed]
    theirs = labeled_batches(DataCollatorForSeq2Seq(SIDES[side], pad_to_multiple_of=4), ROUTES, NAMES)(encode(weighed))
    ours = RoutedCollator(SIDES[side], ROUTES, pad_to_multiple_of=4)(weighed)
    assert theirs.keys() == ours.keys()
    for name in ("input_ids", "attention_mask", "route_label", "route_labels"):
        assert name not in ours or torch.equal(theirs[name], ours[name]), name
    assert all(
        torch.equal(theirs["route_weights"][group], ours["route_weights"][group]) for group in ("base", "forget")
    )
    assert theirs["route_environment"] == ["lab", "lab"]


def test_tokens_that_a_collator_cuts_keep_their_labels():
    row = {"input_ids": [5, 6, 7, 8], "route_labels": ["retain", "forget", "forget", "unlabeled"]}
    for cut, expected in ((slice(0, 3), [0, 0, -100]), (slice(1, 4), [0, 2, -100])):
        collate = LabeledBatches(lambda rows, cut=cut: {"input_ids": torch.tensor([rows[0]["input_ids"][cut]])}, ROUTES)
        assert collate([row])["route_labels"].tolist() == [expected]
    masked = LabeledBatches(  # cut to two and padded to four
        lambda rows: {"input_ids": torch.tensor([[0, 0, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}, ROUTES
    )
    assert masked([row])["route_labels"].tolist() == [[-100, -100, 2, -100]]


def test_padding_that_looks_like_the_row_is_told_apart_by_the_mask():
    row = {"input_ids": [5, 5], "route_labels": ["retain", "forget"]}
    batch = {"input_ids": torch.tensor([[5, 5, 5]])}
    collate = LabeledBatches(lambda rows: dict(batch), ROUTES)
    with pytest.raises(ValueError, match="the tokens of row 0 cannot be found in the batch"):
        collate([row])
    batch["attention_mask"] = torch.tensor([[0, 1, 1]])
    assert collate([row])["route_labels"].tolist() == [[-100, 0, -100]]


def test_a_collator_that_reads_the_columns_itself_gets_names():
    """As a function around `RoutedCollator` does; the names it is given are those of the dataset's integers."""
    ours = RoutedCollator(TOKENIZER, dict(reversed(ROUTES.items())))
    batch = labeled_batches(lambda rows: ours(rows) | {"more": 1}, ROUTES, NAMES)(encoded(ROWS))
    assert batch["route_label"].tolist() == [1, 0] and batch["more"] == 1


def test_without_routes_no_column_is_left():
    collate = labeled_batches(DataCollatorForSeq2Seq(TOKENIZER), None)
    rows = [row | {"route_environment": "lab", "route_quarantine": "forget"} for row in ROWS]
    assert set(collate(rows)) == {"input_ids", "attention_mask", "labels"}
    assert set(labeled_batches(RoutedCollator(TOKENIZER, ROUTES), None)(rows)) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_our_own_collator_takes_the_routes_and_names_of_the_trainer():
    other = RoutedCollator(TOKENIZER, dict(reversed(ROUTES.items())), max_length=2)
    assert other([{"input_ids": [5, 6, 7], "route_label": "forget"}])["route_label"].tolist() == [2]
    mended = labeled_batches(other, ROUTES, NAMES)
    batch = mended(encoded(ROWS))
    assert batch["route_label"].tolist() == [1, 0] and batch["input_ids"].shape == (2, 2)
    assert other.class_names is None and list(other.routes)[0] == "unlabeled"  # as it was


def test_it_goes_to_worker_processes():
    collate = pickle.loads(pickle.dumps(labeled_batches(DataCollatorForSeq2Seq(TOKENIZER), ROUTES, NAMES)))
    assert collate(encoded(ROWS))["route_label"].tolist() == [1, 0]


def flat(rows):
    return {"input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]])}


def changed(rows):
    return {"input_ids": torch.tensor([[1, *row["input_ids"][:2]] for row in rows])}


REFUSED = {
    "integers without names": (default_data_collator, [{"input_ids": [5], "route_label": 1}], None, "cast_column"),
    "an integer beyond the names": (
        default_data_collator,
        [{"input_ids": [5], "route_label": 3}],
        NAMES,
        "outside the 3",
    ),
    "no label": (default_data_collator, [{"input_ids": [5]}], None, "no column `route_label`"),
    "both": (default_data_collator, [ROWS[0] | TOKENS[0]], None, "got both"),
    "null": (default_data_collator, [{"input_ids": [5], "route_label": None}], None, "is null"),
    "no route": (default_data_collator, [{"input_ids": [5], "route_label": "forgte"}], None, "did you mean 'forget'"),
    "bool": (default_data_collator, [{"input_ids": [5], "route_label": True}], NAMES, "of type bool"),
    "float": (default_data_collator, [{"input_ids": [5], "route_label": 1.0}], NAMES, "of type float"),
    "flattened": (flat, ROWS, None, "a batch of 1 rows out of 2"),
    "another order": (lambda rows: DataCollatorForSeq2Seq(TOKENIZER)(rows[::-1]), ROWS, None, "the order of rows"),
    "tokens changed": (changed, TOKENS, None, "the tokens of row 0 cannot be found"),
    "too few labels": (
        DataCollatorForSeq2Seq(TOKENIZER),
        [{"input_ids": [5, 6], "route_labels": ["forget"]}],
        None,
        "needs one value per token",
    ),
    "no dictionary": (default_data_collator, [([5], "forget")], None, "rows are dictionaries"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    collator, rows, names, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        labeled_batches(collator, ROUTES, names)(rows)


def test_a_collator_may_change_tokens_where_rows_have_one_label():
    assert labeled_batches(changed, ROUTES)(ROWS)["route_label"].tolist() == [1, 0]
