"""Loading of training files and texts: JSONL, Parquet or datasets of the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, Value, concatenate_datasets, load_dataset

from routed_peft.data.columns import ROUTE_LABEL
from routed_peft.deprecation import formerly_positional
from routed_peft.tasks.utils import read_rows

_READERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet"}


@formerly_positional("columns", "streaming")
def load_training_file(
    source: str | os.PathLike[str],
    split: str = "train",
    *,
    columns: Sequence[str] = ("text", ROUTE_LABEL),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load a training file and check that it has its columns.

    Args:
        source: a ``.jsonl``, ``.json`` (both also ``.gz``) or ``.parquet`` file, or the id of a dataset on the Hub, or
            a directory laid out like one.
        split: split of a Hub dataset or directory; a single file is one split, whatever its name.
        columns: required columns.
        streaming: return an IterableDataset, which reads rows as they are needed.

    Raises:
        ValueError: if a column is missing, the file is empty, or its kind is unknown.
        FileNotFoundError: if there is no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "train.jsonl")
        ...     _ = path.write_text('{"text": "a", "route_label": "forget"}')
        ...     list(load_training_file(path, streaming=True))
        [{'text': 'a', 'route_label': 'forget'}]
    """
    path, name = Path(source), str(source)
    reader = next((reader for ending, reader in _READERS.items() if name.endswith(ending)), None)
    if reader and not path.is_file():
        raise FileNotFoundError(f"there is no file {name!r}")
    if path.is_file():
        if reader is None:
            raise ValueError(f"`source` must be one of {', '.join(_READERS)}, or a Hub dataset, got {name!r}")
        if not path.stat().st_size:
            raise ValueError(f"{name!r} is empty: it must hold one row or more")
        ds = load_dataset(reader, data_files=name, split="train", streaming=streaming)
    else:
        ds = load_dataset(name, split=split, streaming=streaming)
    found = ds.column_names or list(next(iter(ds), {}))  # a stream learns its columns from its first row
    if missing := [column for column in columns if column not in found]:
        raise ValueError(
            f"{name!r} lacks the columns {missing}, got {found}: every row needs its text and, for training, a label "
            "(`routed_peft.data` has functions that add labels)"
        )
    return ds


def load_texts(files: Sequence[str | os.PathLike[str]]) -> Dataset:
    """Load and concatenate the column ``text`` of several training files.

    Raises:
        ValueError: where a file is a directory, and as `load_training_file` does.
    """
    if folders := [str(file) for file in files if Path(file).is_dir()]:
        raise ValueError(f"{folders[0]!r} is a directory: name each of its files that should be read")
    parts = [load_training_file(file, columns=["text"]).select_columns("text") for file in files]
    alike = [part.cast_column("text", Value("string")) for part in parts]  # Parquet of pandas has long strings
    return concatenate_datasets(alike)


def read_texts(file: str | Path, argument: str, limit: int | None = None) -> list[str]:
    """Read the column ``text`` of a JSONL file.

    Raises:
        ValueError: where the file is missing or empty, a line is no JSON object, or a row has no text.
    """
    return [text for text, _ in _read(file, argument)][:limit]


def read_facts(file: str | Path) -> list[str | tuple[str, ...]]:
    """Read facts of a JSONL file, for `AttackData`: ``text``, and ``fact`` to group rows that reveal each other.

    Raises:
        ValueError: as `read_texts` does.
    """
    facts: dict[Any, list[str]] = {}
    for number, (text, row) in enumerate(_read(file, "facts")):
        facts.setdefault(json.dumps(row["fact"]) if "fact" in row else number, []).append(text)
    return [tuple(texts) for texts in facts.values()]


def _read(file: str | Path, argument: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for number, row in enumerate(read_rows(file, argument), 1):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{argument}` must hold a non-empty `text` in every row, got {text!r} in row {number}")
        found.append((text, row))
    return found
