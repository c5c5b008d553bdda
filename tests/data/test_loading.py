from __future__ import annotations

import gzip
import json

import pandas
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from routed_peft.corpora import load_pair
from routed_peft.data import load_texts, load_training_file, train_tokenizer

ROWS = [{"text": "a tree", "route_label": "forget"}, {"text": "a dog", "route_label": "retain"}]


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def path(request, tmp_path):
    path = tmp_path / f"train.{request.param}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if request.param == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif request.param == "jsonl":
        path.write_text(lines)
    else:
        path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_files_load(path, streaming):
    for source in (path, str(path)):
        ds = load_training_file(source, streaming=streaming)
        assert isinstance(ds, IterableDataset if streaming else Dataset)
        assert list(ds) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_loads_like_a_hub_dataset(tmp_path, streaming):
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_training_file(tmp_path, "validation", streaming=streaming)) == ROWS[:1]


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_raise(path, streaming):
    with pytest.raises(ValueError, match=r"lacks the columns \['side'\], got \['text', 'route_label'\]"):
        load_training_file(path, columns=("text", "side"), streaming=streaming)


def test_missing_and_unknown_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file.*none.jsonl"):
        load_training_file(tmp_path / "none.jsonl")
    table = tmp_path / "train.csv"
    table.write_text("text,route_label\n")
    with pytest.raises(ValueError, match="`source` must be one of .jsonl"):
        load_training_file(table)


def test_texts_of_several_files_follow_each_other(tmp_path):
    pandas.DataFrame({"text": ["c"], "side": ["retain"]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert load_texts([tmp_path / "a.jsonl", tmp_path / "b.parquet"])["text"][:] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="is a directory: name each of its files"):
        load_texts([tmp_path])
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a.jsonl' is empty"):
        load_texts([tmp_path / "a.jsonl"])


TEXTS = load_pair("biology", "validation")["text"][:]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=600)


def test_the_tokenizer_is_the_same_every_time_and_survives_saving(tmp_path):
    again = train_tokenizer(iter(TEXTS), vocab_size=600)
    assert again.get_vocab() == TOKENIZER.get_vocab() and len(again) == 600
    assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (0, 1, 1)
    again.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[:20])["input_ids"] == TOKENIZER(TEXTS[:20])["input_ids"]
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<pad>", "<eos>", TOKENIZER.padding_side)


@settings(max_examples=100, deadline=None)
@given(st.text().filter(lambda text: "<eos>" not in text and "<pad>" not in text))
def test_any_text_can_be_written(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_a_vocabulary_without_room_for_bytes_raises():
    with pytest.raises(ValueError, match="`vocab_size` must be at least 258"):
        train_tokenizer(["a"], vocab_size=200)
