from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from routed_peft import presets
from routed_peft.data import RoutedCollator, class_names, shift, train_tokenizer

ROUTES = presets.sgtm("forget")  # forget 0, retain 1, unlabeled 2
NAMES = list(ROUTES)
TOKENIZER = train_tokenizer(["a"], vocab_size=258)


def tokenizer(padding="right", truncation="right"):
    copy = train_tokenizer(["a"], vocab_size=258)
    copy.padding_side, copy.truncation_side = padding, truncation
    return copy


SIDES = {side: tokenizer(side) for side in ("left", "right")}
tokens = st.lists(st.tuples(st.integers(2, 257), st.sampled_from(NAMES)), min_size=1, max_size=9)


@settings(deadline=None)
@given(
    rows=st.lists(tokens, min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 1, 4, 8]),
)
def test_every_token_label_stands_where_its_token_is_predicted(rows, side, multiple):
    features = [{"input_ids": [i for i, _ in row], "route_labels": [label for _, label in row]} for row in rows]
    batch = RoutedCollator(SIDES[side], ROUTES, pad_to_multiple_of=multiple)(features)
    length = batch["input_ids"].shape[1]
    assert length % (multiple or 1) == 0 and length - max(map(len, rows)) < (multiple or 1)
    for b, row in enumerate(rows):
        start = length - len(row) if side == "left" else 0
        expected = torch.full((length,), -100)
        for k, (_, label) in enumerate(row[1:], 1):
            expected[start + k - 1] = NAMES.index(label)
        assert batch["route_labels"][b].equal(expected)
        inside = torch.zeros(length, dtype=torch.bool)
        inside[start : start + len(row)] = True
        assert batch["attention_mask"][b].equal(inside.long())
        assert batch["input_ids"][b][inside].tolist() == [i for i, _ in row]
        assert (batch["input_ids"][b][~inside] == 0).all() and (batch["labels"][b][~inside] == -100).all()
    # wherever the loss reaches (a position whose next label counts), a route label says what it teaches
    reached = batch["labels"][:, 1:] != -100
    assert (batch["route_labels"][:, :-1] != -100).equal(reached)


@settings(deadline=None)
@given(row=tokens, length=st.integers(1, 6), side=st.sampled_from(["left", "right"]))
def test_truncation_cuts_tokens_labels_and_weights_alike(row, length, side):
    ids, labels = [i for i, _ in row], [label for _, label in row]
    weights = [float(i) for i in ids]
    feature = {"input_ids": ids, "route_labels": labels, "route_weights": {"base": weights}}
    batch = RoutedCollator(tokenizer(truncation=side), ROUTES, max_length=length)([feature])
    kept = slice(-length, None) if side == "left" else slice(0, length)
    assert batch["input_ids"][0].tolist() == ids[kept]
    assert batch["route_weights"]["base"][0].tolist() == weights[kept]
    assert batch["route_labels"][0].tolist() == [NAMES.index(label) for label in labels[kept][1:]] + [-100]


def test_left_and_right_padding_give_one_loss():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config).double()
    features = [{"input_ids": [5, 6, 7, 8, 9], "route_label": "forget"}, {"input_ids": [8, 9], "route_label": "retain"}]
    batches = [RoutedCollator(SIDES[side], ROUTES)(features) for side in ("left", "right")]
    for batch in batches:
        assert batch.pop("route_label").tolist() == [0, 1]
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    losses = [model(**batch).loss for batch in batches]
    torch.testing.assert_close(losses[0], losses[1])


def test_example_labels_and_plain_labels():
    batch = RoutedCollator(TOKENIZER, ROUTES)(
        [{"input_ids": [5, 6], "route_label": label} for label in ("unlabeled", "forget", "retain")]
    )
    assert batch["route_label"].tolist() == [2, 0, 1] and batch["route_label"].dtype == torch.long
    assert batch["labels"].equal(batch["input_ids"])
    assert "route_labels" not in batch and "route_weights" not in batch


def test_own_labels_and_masks_are_kept():
    feature = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 0]}
    batch = RoutedCollator(TOKENIZER, ROUTES)([feature | {"route_labels": ["retain", "forget", "retain", "forget"]}])
    assert batch["labels"].tolist() == [[-100, -100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert batch["route_labels"].tolist() == [[0, 1, -100, -100]]


def test_class_labels_are_resolved_by_name():
    """The dataset's own numbers run the other way round from the routes' order."""
    names = ["unlabeled", "retain", "forget"]
    features = Features({"input_ids": List(Value("int64")), "route_label": ClassLabel(names=names)})
    ds = Dataset.from_dict({"input_ids": [[5], [6], [7]], "route_label": [2, 1, 0]}, features=features)
    for rows in (list(ds), list(ds.with_format("torch")), list(ds.with_format("numpy"))):
        assert RoutedCollator(TOKENIZER, ROUTES, class_names=class_names(ds))(rows)["route_label"].tolist() == [0, 1, 2]
    features = Features({"input_ids": List(Value("int64")), "route_labels": List(ClassLabel(names=names))})
    ds = Dataset.from_dict({"input_ids": [[5, 6, 7]], "route_labels": [[2, 0, -100]]}, features=features)
    for rows in (list(ds), list(ds.with_format("torch")), list(ds.with_format("numpy"))):
        batch = RoutedCollator(TOKENIZER, ROUTES, class_names=class_names(ds))(rows)
        assert batch["route_labels"].tolist() == [[2, -100, -100]]


def test_weights_per_example_and_per_position():
    collate = RoutedCollator(SIDES["left"], ROUTES)
    rows = [{"input_ids": [5, 6, 7], "route_label": "forget"}, {"input_ids": [8], "route_label": "retain"}]
    per_position = [row | {"route_weights": {"base": w}} for row, w in zip(rows, ([0.5, -1, 2], [3]), strict=True)]
    batch = collate(per_position)
    assert batch["route_weights"]["base"].tolist() == [[0.5, -1, 2], [1, 1, 3]]
    per_example = [row | {"route_weights": {"base": w, "bio": 2}} for row, w in zip(rows, (0.5, 1), strict=True)]
    weights = collate(per_example)["route_weights"]
    assert {name: w.tolist() for name, w in weights.items()} == {"base": [0.5, 1.0], "bio": [2.0, 2.0]}
    assert weights["bio"].dtype == torch.float32


def test_it_serves_a_data_loader():
    ds = Dataset.from_dict({"input_ids": [[5, 6]] * 5, "route_label": ["forget"] * 5})
    batches = list(DataLoader(ds, batch_size=2, collate_fn=RoutedCollator(TOKENIZER, ROUTES)))
    assert [len(batch["route_label"]) for batch in batches] == [2, 2, 1]


def test_shift_lines_up_with_the_next_token_loss():
    labels = torch.arange(12).reshape(2, 6)
    assert shift(labels)[:, :-1].equal(labels[:, 1:]) and (shift(labels)[:, -1] == -100).all()
    assert shift(labels).equal(F.pad(labels, (0, 1), value=-100)[:, 1:])


ROW = {"input_ids": [5, 6]}
BAD = {
    "no column": ([ROW], "no column `route_label`.*packing=True"),
    "null": ([ROW | {"route_label": None}], "`route_label` is null"),
    "null token": ([ROW | {"route_labels": ["forget", None]}], "a label is null"),
    "null in one row": ([ROW | {"route_label": "forget"}, ROW | {"route_label": None}], "missing or null in others"),
    "missing class": ([ROW | {"route_label": -1}], "-1 has no name"),
    "unknown": ([ROW | {"route_label": "forgte"}], r"'forgte' has no route.*'unlabeled'\].*did you mean 'forget'"),
    "unknown, far": ([ROW | {"route_label": "xyz"}], "add a route of this name"),
    "integer": ([ROW | {"route_label": 0}], "integer label 0 has no name.*class_names"),
    "ignored example": ([ROW | {"route_label": -100}], "integer label -100"),
    "float": ([ROW | {"route_label": float("nan")}], "got nan of type float"),
    "length": ([ROW | {"route_labels": ["forget"]}], "`route_labels` needs one value per token: got 1, expected 2"),
    "one string": ([ROW | {"route_labels": "forget"}], "`route_labels` needs one value per token"),
    "both": ([ROW | {"route_labels": ["forget"] * 2, "route_label": "forget"}], "got both"),
    "mixed": ([ROW | {"route_label": "forget"}, ROW | {"route_labels": ["forget"] * 2}], "in some rows and missing"),
    "mixed labels": ([ROW | {"route_label": "forget", "labels": [1, 2]}, ROW | {"route_label": "retain"}], "`labels`"),
    "no tokens": ([{"text": "a", "route_label": "forget"}], "tokenize the text first"),
    "mask": ([ROW | {"route_label": "forget", "attention_mask": [1]}], "`attention_mask` needs one value per token"),
    "weights": ([ROW | {"route_label": "forget", "route_weights": {"base": [1.0]}}], "`route_weights` needs one value"),
    "NaN": ([ROW | {"route_label": "forget", "route_weights": {"base": np.nan}}], "finite numbers"),
    "null weight": ([ROW | {"route_label": "forget", "route_weights": {"base": None}}], "'base' in every row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_raise(case):
    rows, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        RoutedCollator(TOKENIZER, ROUTES)(rows)


def test_bad_class_integers_raise():
    collate = RoutedCollator(TOKENIZER, ROUTES, class_names=["retain", "forget"])
    with pytest.raises(ValueError, match="a label is null"):
        collate([ROW | {"route_label": -1}])
    with pytest.raises(ValueError, match="5 is outside the 2 classes"):
        collate([ROW | {"route_label": 5}])


def test_no_padding_token_raises_only_where_one_is_needed():
    bare = train_tokenizer(["a"], vocab_size=258)
    bare.pad_token = None
    collate = RoutedCollator(bare, ROUTES)
    assert collate([ROW | {"route_label": "forget"}] * 2)["input_ids"].tolist() == [[5, 6]] * 2
    with pytest.raises(ValueError, match="`tokenizer.pad_token = tokenizer.eos_token`"):
        collate([ROW | {"route_label": "forget"}, {"input_ids": [5], "route_label": "forget"}])


def test_bad_max_length_raises():
    with pytest.raises(ValueError, match="`max_length` must be at least 1"):
        RoutedCollator(TOKENIZER, ROUTES, max_length=0)
