"""Datasets of the Hub, whose JSON `datasets` reads with types of its own: what is not a string is refused."""

from __future__ import annotations

import json

import datasets
import pytest

from routed_peft.data import DocumentArguments, labeled_documents
from routed_peft.data import loading as loading_module
from routed_peft.data.loading import TextFormat, load_documents, load_training_file, read_texts


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Make `org/data` of rows, as a dataset of JSON lines on the Hub."""
    read = datasets.load_dataset

    def offline(path, *, split, streaming=False, **more):
        more = more or {"data_files": str(tmp_path / "data.jsonl")}
        name = "parquet" if path == "parquet" else "json"
        return read(name, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"), **more)

    def make(rows):
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return "org/data"

    monkeypatch.setattr(loading_module, "load_dataset", offline)
    return make


ODD = {
    "a number among strings": [{"text": "a"}] * 50 + [{"text": 12}],
    "numbers": [{"text": 12}] * 3,
    "dates": [{"text": "2024-01-01"}] * 3,
    "times": [{"text": "2024-01-01T10:00:00"}] * 3,
    "truth values": [{"text": True}] * 3,
    "blank": [{"text": "a"}, {"text": " "}],
    "null": [{"text": "a"}, {"text": None}],
    "objects": [{"text": {"a": 1}}] * 2,
}


@pytest.mark.parametrize("case", ODD)
def test_text_that_is_no_text_is_refused(hub, case):
    source = hub([row | {"side": "forget"} for row in ODD[case]])
    for read in (
        lambda: load_training_file(source, columns=["text"]),
        lambda: load_documents(source),
        lambda: read_texts(source, "x"),
        lambda: labeled_documents(DocumentArguments(train_file=source)),
        lambda: list(load_training_file(source, columns=["text"], streaming=True)),
    ):
        with pytest.raises(ValueError, match="must hold a non-empty `text`|needs strings in the column `text`"):
            read()


def test_text_is_read_as_it_is(hub):
    rows = [{"text": "a", "route_label": "forget", "n": 1}, {"text": "12", "route_label": "retain", "n": "x"}]
    source = hub(rows)
    assert load_training_file(source)["text"][:] == ["a", "12"]
    stream = load_training_file(source, streaming=True)
    assert set(stream.column_names) == {"text", "route_label", "n"} and list(stream) == rows


@pytest.mark.parametrize("column", ["route_label", "side"])
@pytest.mark.parametrize("values", [[True, False], [1, 0], ["2024-01-01", "2024-01-02"], ["forget", 1], [1.5, 2.5]])
def test_labels_that_are_no_names_are_refused(hub, column, values):
    source = hub([{"text": "a", column: value} for value in values])
    with pytest.raises(ValueError, match=f"need strings in the column `{column}`"):
        labeled_documents(DocumentArguments(train_file=source))


def test_dates_in_a_template_and_in_chats_are_refused(hub):
    source = hub([{"question": "when?", "answer": "2024-01-01"}] * 2)
    with pytest.raises(ValueError, match=r"has timestamp.* in `answer`"):
        read_texts(source, "x", form=TextFormat(template="{question} {answer}"))

    class Tokenizer:
        chat_template = "any"

        def apply_chat_template(self, messages, tokenize):
            return str(messages)

    form = TextFormat(load_tokenizer=Tokenizer)
    for content in ("2024-01-01", 3):
        source = hub([{"messages": [{"role": "user", "content": content}]}] * 2)
        with pytest.raises(ValueError, match="`content` must be a string, got"):
            read_texts(source, "x", form=form)


def test_a_stream_of_parquet_is_checked_too(tmp_path):
    datasets.Dataset.from_dict({"text": [1, 2], "route_label": ["forget", "retain"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must hold a non-empty `text` in every row, as a string, got 1 in row 1"):
        list(load_training_file(tmp_path / "a.parquet", streaming=True))
