"""Training files: JSONL, Parquet or a dataset of the Hub, with the columns that training needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, IterableDataset, Value, concatenate_datasets, load_dataset

from routed_peft.data.columns import ROUTE_LABEL

_READERS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".json.gz": "json", ".parquet": "parquet"}


def load_training_file(
    source: str | os.PathLike[str],
    split: str = "train",
    columns: Sequence[str] = ("text", ROUTE_LABEL),
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load a training file and check that it has its columns.

    Args:
        source: a ``.jsonl``, ``.json`` (both also ``.gz``) or ``.parquet`` file, or the id of a dataset on the Hub, or
            a directory laid out like one.
        split: which split of a Hub dataset or directory; a single file is one split, whatever it is called.
        columns: that must be there.
        streaming: read rows as they are needed, into an IterableDataset.

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
            raise ValueError(f"{name!r} is empty: it must hold a row at least")
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
    """Load the column ``text`` of several training files, one after the other.

    Raises:
        ValueError: a file is a directory, of which a part would be taken; and what `load_training_file` raises.
    """
    if folders := [str(file) for file in files if Path(file).is_dir()]:
        raise ValueError(f"{folders[0]!r} is a directory: name the files in it that count, one by one")
    parts = [load_training_file(file, columns=["text"]).select_columns("text") for file in files]
    alike = [part.cast_column("text", Value("string")) for part in parts]  # Parquet of pandas has long strings
    return concatenate_datasets(alike)
