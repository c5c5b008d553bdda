"""Padding that rows do not declare, and packed documents, in the collator and in batches of other collators."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from routed_peft import presets
from routed_peft.data import RoutedCollator, train_tokenizer
from routed_peft.data.padding import PACKED_COLUMNS, check_batch

TOKENIZER = train_tokenizer(["a"], vocab_size=258)
PAD = TOKENIZER.pad_token_id
TEXT = [70, 71, 72]


def sharing(*roles: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.bos_token = None  # it is the end, too
    for role in roles:
        setattr(tokenizer, role, tokenizer.eos_token)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def collate(*rows: list[int], tokenizer=TOKENIZER, routes=presets.sgtm("forget"), **columns):  # noqa: B008
    label = {"route_label": "retain"} if "route_labels" not in columns and routes is not None else {}
    return RoutedCollator(tokenizer, routes)([{"input_ids": ids, **label, **columns} for ids in rows])


@pytest.mark.parametrize("routes", [presets.sgtm("forget"), None])
@pytest.mark.parametrize("given", [{}, {"labels": [70, 71, 72, PAD, PAD]}])
def test_pads_of_a_row_without_a_mask_do_not_train(given, routes):
    batch = collate([*TEXT, PAD, PAD], routes=routes, **given)
    masked = collate([*TEXT, PAD, PAD], routes=routes, attention_mask=[1, 1, 1, 0, 0])
    assert batch["labels"].tolist() == [[70, 71, 72, -100, -100]]
    assert all(torch.equal(batch[name], masked[name]) for name in batch)


def test_pads_on_the_left_and_of_ready_tensors_do_not_train():
    batch = collate(torch.tensor([PAD, PAD, *TEXT]))
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 71, 72]], "padding predicts nothing"
    tokens = collate([*TEXT, PAD], route_labels=["retain", "forget", "retain", "retain"])
    assert tokens["route_labels"].tolist() == [[0, 1, -100, -100]]


def test_rows_without_pads_are_as_they_were():
    for ids in (TEXT, [70, PAD, 71], [TOKENIZER.bos_token_id or 70, *TEXT, TOKENIZER.eos_token_id]):
        batch = collate(ids)
        assert batch["attention_mask"].all() and batch["labels"].tolist() == [ids]


def test_a_mask_that_is_given_is_taken():
    batch = collate([*TEXT, PAD], attention_mask=[1, 1, 1, 1])
    assert batch["labels"].tolist() == [[*TEXT, PAD]]


def test_pads_that_are_ends_of_text_too_are_refused_unless_they_can_be_told_apart():
    tokenizer = sharing()
    end = tokenizer.eos_token_id
    assert collate([*TEXT, end], tokenizer=tokenizer)["labels"].tolist() == [[*TEXT, end]], "the end of a text"
    for ids in ([*TEXT, end, end], [end, end, end, *TEXT], [end] * 4):
        with pytest.raises(ValueError, match=r"padding and `eos_token` alike.*`attention_mask`"):
            collate(ids, tokenizer=tokenizer)
    declared = collate([*TEXT, end, end], tokenizer=tokenizer, labels=[*TEXT, end, -100])
    assert declared["labels"].tolist() == [[*TEXT, end, -100]]
    masked = collate([*TEXT, end, end], tokenizer=tokenizer, attention_mask=[1, 1, 1, 1, 0])
    assert masked["labels"].tolist() == [[*TEXT, end, -100]]
    both = sharing("bos_token")
    assert collate([end, end, *TEXT], tokenizer=both)["attention_mask"].all(), "one text ends, and the next begins"


@pytest.mark.parametrize("routes", [presets.sgtm("forget"), None])
@pytest.mark.parametrize("name", PACKED_COLUMNS)
def test_packed_documents_are_refused(name, routes):
    with pytest.raises(ValueError, match=rf"the column `{name}`.*`routed_peft.data.pack`"):
        collate(TEXT, routes=routes, **{name: [0, 1, 0]})


@pytest.mark.parametrize("mask", [[1, 1, 2], [[1, 0, 0], [1, 1, 0], [0, 0, 1]], [0, 1, -1]])
def test_masks_that_keep_documents_apart_are_refused(mask):
    with pytest.raises(ValueError, match="one 0 or 1 per token"):
        collate(TEXT, attention_mask=mask)


def batch_of(ids: list[int], labels: list[int] | None = None, **more: list) -> dict[str, torch.Tensor]:
    rows = {"input_ids": ids, "labels": ids if labels is None else labels, **more}
    return {name: torch.tensor([values]) for name, values in rows.items()}


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([*TEXT, PAD]),
        batch_of([PAD, *TEXT]),
        batch_of([*TEXT, PAD], attention_mask=[1, 1, 1, 0]),
        batch_of([*TEXT, 99], attention_mask=[1, 1, 1, 0]),
    ],
)
def test_batches_that_train_on_padding_are_refused(batch):
    with pytest.raises(ValueError, match="gives padding a loss: `labels` of row 0"):
        check_batch(batch, TOKENIZER)


@pytest.mark.parametrize(
    "batch",
    [
        batch_of([*TEXT, 73, 74], position_ids=[0, 1, 2, 0, 1]),
        batch_of([*TEXT, 73, 74], cu_seq_lens_q=[0, 3, 5]),
        batch_of(TEXT, attention_mask=[1, 1, 2]),
        {**batch_of(TEXT), "attention_mask": torch.ones(1, 1, 3, 3)},
    ],
)
def test_batches_of_packed_documents_are_refused(batch):
    with pytest.raises(ValueError, match="documents in one row"):
        check_batch(batch, TOKENIZER)


def test_batches_that_are_right_pass():
    check_batch(batch_of(TEXT), TOKENIZER)
    check_batch(batch_of([*TEXT, PAD], [*TEXT, -100]), TOKENIZER)
    check_batch(batch_of([*TEXT, PAD], [*TEXT, -100], attention_mask=[1, 1, 1, 0]), None)
    left = batch_of(
        [PAD, PAD, *TEXT], [-100, -100, *TEXT], attention_mask=[0, 0, 1, 1, 1], position_ids=[1, 1, 0, 1, 2]
    )
    check_batch(left, TOKENIZER)
    check_batch(batch_of(TEXT, position_ids=[0, 1, 2]), None)
    check_batch({"labels": torch.tensor([1])}, None)
