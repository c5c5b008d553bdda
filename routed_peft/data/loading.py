"""Reading of text, the same for every recipe and command: JSONL, JSON lists, Parquet, plain text or the Hub."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, Value, concatenate_datasets, load_dataset

from routed_peft.data.columns import ROUTE_LABEL, check_texts

ENDINGS = (".jsonl", ".json", ".txt", ".parquet")
"""Kinds of files; all but Parquet may be gzipped, with ``.gz`` behind."""
TEXT, CHAT, TOKENS = "text", "messages", "input_ids"
Source = str | os.PathLike[str]


class MissingFileError(FileNotFoundError, ValueError):
    """Error on a file that is not there."""


@dataclass(frozen=True)
class TextFormat:
    """Place of the text in a row. Without a column ``text``, chats in ``messages`` or tokens in ``input_ids`` are read."""

    column: str = TEXT  # of text, or of chats: lists of messages, each with `role` and `content`
    template: str | None = None  # text with columns in braces, such as "{question} {answer}", in place of one column
    load_tokenizer: Callable[[], Any] | None = None  # its chat template writes chats as text, and it decodes tokens


PLAIN = TextFormat()
"""Text where it is by default."""


def load_training_file(
    source: Source, split: str = "train", *, columns: Sequence[str] = (TEXT, ROUTE_LABEL), streaming: bool = False
) -> Dataset | IterableDataset:
    """Load rows of a ``source``, as `load_rows` does, and check that they have their ``columns``, the text's of strings.

    ``split`` is of a Hub dataset or directory; a single file is one split. With ``streaming``, an IterableDataset reads rows
    as they are needed.

    Raises:
        ValueError: if a column is missing, a text is blank or no string, or the file is empty or of another kind.
        FileNotFoundError: if there is no such file.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.jsonl")
    ...     _ = path.write_text('{"text": "a", "route_label": "forget"}')
    ...     list(load_training_file(path, streaming=True))
    [{'text': 'a', 'route_label': 'forget'}]
    """
    strict = {TEXT, ROUTE_LABEL, "side", *columns}
    ds = _stream(source, split) if streaming else load_rows(source, split, strict=strict)
    found = ds.column_names or list(next(iter(ds), {}))  # a stream learns its columns from its first row
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"{str(source)!r} lacks the columns {missing}, got {found}: every row needs its text and, for "
                         "training, a label (`routed_peft.data` has functions that add labels)")  # fmt: skip
    if TEXT in columns and isinstance(ds, Dataset):
        check_texts(ds, TEXT, repr(str(source)))
    return ds


def load_documents(
    source: Source, *, argument: str = "source", form: TextFormat = PLAIN, keep_tokens: bool = False
) -> Dataset:
    """Load rows, as `load_rows` does, with their text as the column ``text``; ValueError where one is blank or no string.

    ``form`` says where the text is; with ``keep_tokens``, rows that have ``input_ids`` and no text stay as they are.
    """
    strict = {TEXT, CHAT, TOKENS, ROUTE_LABEL, "side", *_text_columns(form, [TEXT])}
    ds, name = load_rows(source, argument=argument, strict=strict), f"`{argument}`"
    if TOKENS in ds.column_names and TEXT not in ds.column_names and form.template is None and form.column == TEXT:
        if keep_tokens:
            return ds
        tokenizer = _tokenizer(form, name, TOKENS)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in ds[TOKENS]]
    else:
        needed = _text_columns(form, ds.column_names)
        if missing := [column for column in needed if column not in ds.column_names]:
            raise ValueError(f"{name} must hold a non-empty `{missing[0]}` in every row, got None in row 1: "
                             f"{str(source)!r} lacks the columns {missing}, got {ds.column_names}; name the text's in "
                             "`text_column`, or several in `text_template`")  # fmt: skip
        if form.template is not None:
            for column in needed:
                if (kind := str(getattr(ds.features[column], "dtype", ""))).startswith(("timestamp", "date", "time")):
                    raise ValueError(f"{name} has {kind} in `{column}`, for `text_template`: write dates as strings")
                if None in (values := ds[column][:]):
                    raise ValueError(f"{name} needs `{column}` in every row, for `text_template`, and has none in row "
                                     f"{values.index(None) + 1}")  # fmt: skip
            texts = [form.template.format_map(row) for row in ds.select_columns(needed)]
        elif isinstance(getattr(ds.features[needed[0]], "feature", None), dict):
            tokenizer = _tokenizer(form, name, needed[0])
            texts = [_chat(tokenizer, chat, name) for chat in ds[needed[0]]]
        else:
            check_texts(ds, needed[0], name)
            if needed != [TEXT]:
                ds = ds.remove_columns([TEXT] if TEXT in ds.column_names else []).rename_column(needed[0], TEXT)
            return ds
    ds = ds.remove_columns([TEXT] if TEXT in ds.column_names else []).add_column(TEXT, texts)
    check_texts(ds, TEXT, name)
    return ds


def _text_columns(form: TextFormat, found: Sequence[str]) -> list[str]:
    """Return the names of the columns of which text is made, whether they are ``found`` or not."""
    if form.template is None:
        return [CHAT] if form.column == TEXT and TEXT not in found and CHAT in found else [form.column]
    fields = [field for _, field, _, _ in Formatter().parse(form.template) if field is not None]
    if not fields:
        raise ValueError(f"`text_template` must name columns in braces, got {form.template!r}: write {{question}}")
    return fields


def load_texts(files: Sequence[Source], *, argument: str = "source", form: TextFormat = PLAIN) -> Dataset:
    """Load and concatenate the text of several files, as the one column ``text``; ValueError also on a directory."""
    if folders := [str(file) for file in files if Path(file).is_dir()]:
        raise ValueError(f"`{argument}` must be a file, got {folders[0]!r}, which is a directory: name each of its files that "
                         "should be read")  # fmt: skip
    parts = [load_documents(file, argument=argument, form=form).select_columns(TEXT) for file in files]
    return concatenate_datasets(parts)


def read_texts(file: str | Path, argument: str, *, limit: int | None = None, form: TextFormat = PLAIN) -> list[str]:
    """Read the texts of a file, as `load_texts` does."""
    return list(load_texts([file], argument=argument, form=form)[TEXT][:limit])


def read_facts(file: str | Path, *, form: TextFormat = PLAIN) -> list[str | tuple[str, ...]]:
    """Read facts for `AttackData`: texts, as `load_documents` does, and in ``fact`` what groups rows that reveal each other."""
    facts: dict[Any, list[str]] = {}
    for number, row in enumerate(load_documents(file, argument="facts", form=form)):
        facts.setdefault(number if row.get("fact") is None else json.dumps(row["fact"]), []).append(row[TEXT])
    return [tuple(texts) for texts in facts.values()]


def read_rows(file: str | Path, argument: str) -> list[dict[str, Any]]:
    """Read the rows of a file as they are, as `load_rows` does."""
    return load_rows(file, argument=argument).to_list()


def load_rows(
    source: Source, split: str = "train", *, argument: str = "source", strict: Collection[str] | None = None
) -> Dataset:
    """Load rows of files, or of a dataset of the Hub; FileNotFoundError and ValueError name the ``argument`` that gave it.

    ``source`` is a ``.jsonl`` file; a ``.json`` file with a list, or with one object a line; a ``.txt`` file, of whose lines
    each is a document; all of them plain or with ``.gz`` behind; a ``.parquet`` file; a pattern such as ``data/*.jsonl``; a
    directory laid out like a dataset of the Hub; or the id of one. Values of a column in ``strict``, by default of all, must
    be of one type; those of others become JSON if they are not.
    """
    files = find_files(source, split, argument)
    parts = [_load_file(file, argument, strict) for file in files or ()] or [load_dataset(str(source), split=split)]
    for i, part in enumerate(parts):
        for column in part.column_names:
            if getattr(part.features[column], "dtype", None) == "large_string":  # as pandas writes
                parts[i] = parts[i].cast_column(column, Value("string"))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def find_files(source: Source, split: str, argument: str) -> list[Path] | None:
    """Return the files that ``source`` names; None for a dataset of the Hub, or a directory that only `datasets` can read."""
    path, kinds = Path(source).expanduser(), ", ".join(ENDINGS)
    if path.is_dir():
        found = (file for pattern in (f"{split}*", f"data/{split}*") for file in sorted(path.glob(pattern)))
        return [file for file in found if _ending(file)] or None
    if path.is_file():
        if _ending(path) is None and path.suffix:  # without an ending: JSONL
            raise ValueError(f"`{argument}` must be one of {kinds}, a pattern or a Hub dataset, got {str(source)!r}")
        return [path]
    if glob.has_magic(str(path)):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if _ending(Path(file))]
        if not files:
            raise MissingFileError(f"`{argument}` is a pattern that matches no file of {kinds}: {str(source)!r}")
        return files
    if _ending(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise MissingFileError(f"`{argument}` must be a file, and there is no file {str(source)!r}: give a full path")
    return None


def _ending(file: Path) -> str | None:
    ending = "." + file.name.removesuffix(".gz").rpartition(".")[2]
    return ending if ending in ENDINGS and (ending != ".parquet" or file.suffix != ".gz") else None


def _load_file(file: Path, argument: str, strict: Collection[str] | None) -> Dataset:
    expected = f"`{argument}` must hold one JSON object a line and at least one, but {str(file)!r}"
    if not file.stat().st_size:
        raise ValueError(f"{expected} is empty")
    if _ending(file) == ".parquet":
        try:
            ds = Dataset(pq.read_table(file))
        except Exception as error:
            raise ValueError(f"`{argument}`: {str(file)!r} is no readable Parquet: {error}") from error
    else:
        ds = _table(list(_rows(file, argument)), f"`{argument}` ({file})", strict)
    if not len(ds):
        raise ValueError(f"{expected} has no rows")
    return ds


def _rows(file: Path, argument: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of text, whose encoding is UTF-8 with or without a byte order mark."""
    expected = f"`{argument}` must hold one JSON object a line"
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        text = (str(line, "utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(stream))
        number = 0
        try:
            if _ending(file) == ".txt":
                yield from ({TEXT: line.strip()} for line in text if line.strip())
                return
            for number, line in enumerate(text, 1):
                if line.strip():
                    whole = line.lstrip().startswith("[")
                    value = json.loads(line + "".join(text) if whole else line)
                    for row in value if whole else [value]:
                        if not isinstance(row, dict):
                            raise ValueError(f"{expected}, got {str(row)[:60]} in line {number} of {file}")
                        yield row
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{expected}, but in line {number} of {file} {error}") from error
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"`{argument}` must be JSONL in UTF-8, or text in it, plain or as `.gz`, got {file}: "
                             f"{error}") from error  # fmt: skip


def _table(rows: Sequence[dict[str, Any]], name: str, strict: Collection[str] | None) -> Dataset:
    """Make a dataset of rows, without any conversion of values; see `load_rows`."""
    columns: dict[str, Any] = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(column) for row in rows]
        try:
            columns[column] = pa.array(values)
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} has half a character (a lone surrogate) in `{column}`: {error}") from error
        except (pa.ArrowException, OverflowError) as error:
            if strict is not None and column not in strict:
                columns[column] = pa.array([None if value is None else json.dumps(value) for value in values])
                continue
            first = next(value for value in values if value is not None)
            row = next((i for i, value in enumerate(values, 1) if not isinstance(value, type(first) | None)), 1)
            raise ValueError(f"{name} must hold one type in `{column}`, got {values[row - 1]!r} in row {row} beside {first!r}: "
                             "write all of them as strings") from error  # fmt: skip
    return Dataset(pa.table(columns))


def _stream(source: Source, split: str) -> IterableDataset:
    files = find_files(source, split, "source")
    parquet = files is not None and all(_ending(file) == ".parquet" for file in files)
    if files is None or parquet:  # `datasets` makes dates and numbers of text that looks like them
        path, own = ("parquet", {"data_files": list(map(str, files))}) if files else (str(source), {})
        stream = load_dataset(path, split="train" if files else split, streaming=True, **own)
        return stream.map(_checked, with_indices=True, features=stream.features)
    if empty := [str(file) for file in files if not file.stat().st_size]:
        raise ValueError(f"{empty[0]!r} is empty: it must hold one row or more")
    return IterableDataset.from_generator(_checked_rows, gen_kwargs={"files": files})


def _checked_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from map(_checked, _rows(file, "source"), count())


def _checked(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Return a row of a stream, whose text is a string and not blank."""
    if TEXT in row and not (isinstance(row[TEXT], str) and row[TEXT].strip()):
        raise ValueError(f"`source` must hold a non-empty `text` in every row, as a string, got {row[TEXT]!r} in row "
                         f"{index + 1}")  # fmt: skip
    return row


def _tokenizer(form: TextFormat, name: str, column: str) -> Any:
    if form.load_tokenizer is None:
        raise ValueError(f"{name} has no text but `{column}`, which needs a model's own tokenizer: name a model, or the column "
                         "of the text with `text_column`")  # fmt: skip
    return form.load_tokenizer()


def _chat(tokenizer: Any, messages: Any, name: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"{name} holds chats, and the model's tokenizer has no chat template: set one, or write the chats as "
                         "text")  # fmt: skip
    try:
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if odd := [m["content"] for m in given if not isinstance(m.get("content", ""), str | list)]:
            raise ValueError(f"`content` must be a string, got {odd[0]!r}")
        return str(tokenizer.apply_chat_template(given, tokenize=False))
    except Exception as error:  # whatever a template raises
        raise ValueError(f"{name} has a chat that the chat template refuses, {str(messages)[:60]}: {error}") from error
