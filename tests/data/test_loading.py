from __future__ import annotations

import gzip
import json
from functools import cache

import pandas
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from routed_peft.corpora import load_pair
from routed_peft.data import DocumentArguments, labeled_documents, load_texts, load_training_file, pack, train_tokenizer
from routed_peft.data.loading import TextFormat, load_documents, read_facts, read_texts
from routed_peft.tasks import utils

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


@cache
def biology() -> list[str]:
    return load_pair("biology", "validation")["text"][:]


@cache
def biology_tokenizer():
    return train_tokenizer(biology(), vocab_size=600)


def test_the_tokenizer_is_the_same_every_time_and_survives_saving(tmp_path):
    again = train_tokenizer(iter(biology()), vocab_size=600)
    assert again.get_vocab() == biology_tokenizer().get_vocab() and len(again) == 600
    assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (0, 1, 1)
    again.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(biology()[:20])["input_ids"] == biology_tokenizer()(biology()[:20])["input_ids"]
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == (
        "<pad>",
        "<eos>",
        biology_tokenizer().padding_side,
    )


@settings(max_examples=100, deadline=None)
@given(st.text().filter(lambda text: "<eos>" not in text and "<pad>" not in text))
def test_any_text_can_be_written(text):
    assert biology_tokenizer().decode(biology_tokenizer()(text, add_special_tokens=False)["input_ids"]) == text


def test_a_vocabulary_without_room_for_bytes_raises():
    with pytest.raises(ValueError, match="`vocab_size` must be at least 258"):
        train_tokenizer(["a"], vocab_size=200)


CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
CONTENT = {
    "a.jsonl": '{"text": "a\u00e9"}\n\n{"text": "2020-01-01"}\n',
    "a.json": '[{"text": "a\u00e9"},\n {"text": "2020-01-01"}]',
    "a.txt": "a\u00e9\n\n2020-01-01\n",
}


def write(path, content, bom=False, gz=False):
    data = content.encode("utf-8-sig" if bom else "utf-8")
    path = path.with_name(path.name + ".gz" * gz)
    path.write_bytes(gzip.compress(data) if gz else data)
    return path


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("name", CONTENT)
def test_every_reader_reads_every_kind_of_file(tmp_path, name, bom, gz):
    path = write(tmp_path / name, CONTENT[name], bom, gz)
    texts = ["aé", "2020-01-01"]  # a date stays text
    assert load_training_file(path, columns=["text"])["text"][:] == texts
    assert [row["text"] for row in load_training_file(path, columns=["text"], streaming=True)] == texts
    assert load_texts([path])["text"][:] == read_texts(path, "x") == read_facts_flat(path) == texts
    metadata = {"tokenizer": biology_tokenizer(), "forget_file": str(path)}
    assert utils.loss_documents("forget", **metadata)["test"]["text"][:] == texts
    files = DocumentArguments(forget_file=str(path), retain_file=str(path))
    assert labeled_documents(files)["text"][:] == texts * 2


def read_facts_flat(path):
    return [text for texts in read_facts(path) for text in texts]


def test_parquet_and_patterns(tmp_path):
    pandas.DataFrame({"text": ["c"], "n": [1]}).to_parquet(tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", CONTENT["a.jsonl"])
    assert read_texts(tmp_path / "b.parquet", "x") == ["c"]
    assert read_texts(str(tmp_path / "*"), "x") == ["aé", "2020-01-01", "c"]
    with pytest.raises(ValueError, match="`x` is a pattern that matches no file"):
        read_texts(str(tmp_path / "*.json"), "x")


QA = '{"question": "2 + 2?", "answer": 4}\n'


def test_columns_templates_chats_and_tokens(tmp_path):
    qa = write(tmp_path / "qa.jsonl", QA)
    assert read_texts(qa, "x", form=TextFormat(template="{question} {answer}")) == ["2 + 2? 4"]
    assert read_texts(qa, "x", form=TextFormat("question")) == ["2 + 2?"]
    both = write(tmp_path / "both.jsonl", '{"text": "a", "body": "b", "side": "forget"}\n')
    assert load_documents(both, form=TextFormat("body")).to_list() == [{"side": "forget", "text": "b"}]
    tokenizer = train_tokenizer(biology(), vocab_size=300)
    chats = write(tmp_path / "chats.jsonl", json.dumps({"messages": CHAT, "other": CHAT}))
    with pytest.raises(ValueError, match="`x` has no text but `messages`, which needs a model's own tokenizer"):
        read_texts(chats, "x")
    with pytest.raises(ValueError, match="no chat template"):
        read_texts(chats, "x", form=TextFormat(load_tokenizer=lambda: tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for column in ("text", "messages", "other"):
        form = TextFormat(column, load_tokenizer=lambda: tokenizer)
        assert read_texts(chats, "x", form=form) == ["user: 2 + 2?\nassistant: 4\n"]
    ids = tokenizer("a cell", add_special_tokens=False)["input_ids"]
    tokens = write(tmp_path / "tokens.jsonl", json.dumps({"input_ids": ids}))
    assert read_texts(tokens, "x", form=TextFormat(load_tokenizer=lambda: tokenizer)) == ["a cell"]
    plain = write(tmp_path / "plain.jsonl", '{"text": "a cell"}')
    rows = [
        pack(load_documents(file, keep_tokens=True), tokenizer, length=len(ids) + 1)["input_ids"][:]
        for file in (tokens, plain)
    ]
    assert rows[0] == rows[1] == [[*ids, tokenizer.eos_token_id]]


BAD = {
    "a number": '{"text": "a"}\n{"text": 12}',
    "numbers": '{"text": 12}\n{"text": 13}',
    "a list": '{"text": ["a"]}',
    "an object": '{"text": {"a": 1}}\n{"text": "a"}',
    "a truth value": '{"text": true}',
    "blank": '{"text": "a"}\n{"text": "  "}',
    "null": '{"text": "a"}\n{"text": null}',
    "missing": '{"text": "a"}\n{"body": "b"}',
    "no object": '["a", "b"]',
    "no JSON": "text\n",
    "half a list": '[{"text": "a"}',
    "half a character": '{"text": "\\ud800"}',
    "nothing": "\n\n",
    "an empty list": "[]",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BAD)
def test_text_that_is_no_text_is_refused_everywhere(tmp_path, case):
    file = str(write(tmp_path / "bad.jsonl", BAD[case]))
    readers = (
        lambda: load_training_file(file, columns=["text"]),
        lambda: load_texts([file]),
        lambda: read_texts(file, "x"),
        lambda: read_facts(file),
        lambda: utils.loss_documents("forget", tokenizer=biology_tokenizer(), forget_file=file),
        lambda: labeled_documents(DocumentArguments(forget_file=file, retain_file=file)),
    )
    for read in readers:
        with pytest.raises(ValueError) as error:
            read()
        assert "\n" not in str(error.value) and type(error.value).__name__ != "ArrowInvalid"
    if case in ("a number", "blank", "null", "no JSON"):
        with pytest.raises(ValueError):
            list(load_training_file(file, columns=["text"], streaming=True))


def test_numbers_and_dates_of_parquet_are_refused(tmp_path):
    for value in (1, 1.5, True, pandas.Timestamp("2020-01-01"), b"a"):
        pandas.DataFrame({"text": [value], "side": ["forget"]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="needs strings in the column `text`"):
            load_texts([tmp_path / "a.parquet"])
    with pytest.raises(ValueError, match="needs strings in the column `text`, got int64"):
        pack(Dataset.from_dict({"text": [1, 2]}), biology_tokenizer(), length=2)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no readable Parquet"):
        load_texts([tmp_path / "broken.parquet"])


def test_columns_that_nobody_reads_may_hold_anything(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a", "about": {"n": 1}}\n{"text": "b", "about": {"n": "x"}}')
    assert read_texts(file, "x") == ["a", "b"]
