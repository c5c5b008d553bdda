"""Summaries read from files and directories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routed_peft.evaluation.relearning.summary import KIND, read_summary
from routed_peft.runs.records import RUN, SUMMARY

_EXPERIMENT = {"experiment", "settings", "cells"}


@dataclass(frozen=True)
class SummaryKind:
    """A kind of summary that a page can show."""

    name: str  # for messages, such as "relearning"
    origin: str  # the commands that write such a file, for messages
    matches: Callable[[Any], bool]  # tells whether the content of a JSON file is of this kind
    read: Callable[[Path], Mapping[str, Any]]  # returns the content of such a file; ValueError where it is damaged


ATTACKED = SummaryKind(
    "relearning",
    "`routed-peft relearn` writes one to its `--out` directory",
    lambda content: isinstance(content, dict) and content.get("kind") == KIND,
    read_summary,
)
"""Attacks on one checkpoint, by ``routed-peft relearn``."""


@dataclass(frozen=True)
class Source:
    """One summary."""

    name: str  # for readers and file names, different for every source of a report
    file: Path  # it was read from
    kind: SummaryKind
    summary: Mapping[str, Any]  # the content of the file
    digest: str  # the first digits of the file's SHA-256
    run: Mapping[str, Any]  # the content of the ``run.json`` beside it; empty where there is none


def read_sources(places: Sequence[str | Path], kinds: Sequence[SummaryKind] = (ATTACKED,)) -> list[Source]:
    """Read summaries.

    Args:
        places: files and directories; of a directory ``*.json`` in it and ``summary.json`` in its subdirectories, where they
            are summaries.
        kinds: the kinds of summaries that are accepted.

    Raises:
        ValueError: on a missing file, a file that is no summary, a directory without any, and a summary that is damaged or
            of another format. The message names the file.
    """
    if not places:
        raise ValueError("a report needs at least one summary: name files, or directories that hold some")
    files: dict[Path, Path] = {}
    for place in map(Path, places):
        if place.is_dir():
            for file in _summaries_in(place, kinds):
                files.setdefault(file.resolve(), file)
        elif place.is_file():
            files.setdefault(place.resolve(), place)
        else:
            raise ValueError(f"{str(place)!r} does not exist: name summaries, or directories that hold some")
    names = unique_names(list(files))
    return [_read(file, name, kinds) for file, name in zip(files.values(), names, strict=True)]


def load_json(file: Path) -> Any:
    """Return the content of a JSON file; raise ValueError where it is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): was it cut short? Write it anew") from None


def is_experiment(content: Any) -> bool:
    """Return whether the content of a JSON file is a summary of ``recipes/experiment.py``."""
    return isinstance(content, dict) and content.keys() >= _EXPERIMENT


def unique_names(files: Sequence[Path]) -> list[str]:
    """Name every file after itself, or after its folder where it is one ``summary.json`` of many.

    >>> unique_names([Path("/r/biology.json"), Path("/a/rmu/summary.json"), Path("/b/rmu/summary.json")])
    ['biology', 'rmu', 'rmu-2']
    """
    names: list[str] = []
    for file in files:
        plain = file.parent.name if file.name == SUMMARY else file.stem
        same = sum(name == plain or name.startswith(f"{plain}-") for name in names)
        names.append(f"{plain}-{same + 1}" if plain in names else plain)
    return names


def _summaries_in(folder: Path, kinds: Sequence[SummaryKind]) -> list[Path]:
    files = sorted(file for file in (*folder.glob("*.json"), *folder.glob(f"*/{SUMMARY}")) if file.is_file())
    contents = {file: _load_if_json(file) for file in files}
    found = [file for file, content in contents.items() if _kind_of(content, kinds) is not None]
    if not found:
        raise _refusal(folder, "holds", kinds=kinds, contents=[*contents.values()])
    return found


def _refusal(place: Path, verb: str, *, kinds: Sequence[SummaryKind], contents: Sequence[Any]) -> ValueError:
    remedy = f"`python recipes/report.py {place}`, in a clone of the repository, shows experiments"
    remedy = remedy if any(map(is_experiment, contents)) else "; ".join(kind.origin for kind in kinds)
    names = " or of ".join(kind.name for kind in kinds)
    return ValueError(f"{str(place)!r} {verb} no summary of {names}: {remedy}")


def _load_if_json(file: Path) -> Any:
    """Return the content of a file, None where it is not JSON; one that is called summary.json must be JSON."""
    try:
        return load_json(file)
    except ValueError:
        if file.name == SUMMARY:
            raise
        return None


def _kind_of(content: Any, kinds: Sequence[SummaryKind]) -> SummaryKind | None:
    return next((kind for kind in kinds if kind.matches(content)), None)


def _read(file: Path, name: str, kinds: Sequence[SummaryKind]) -> Source:
    content = load_json(file)
    kind = _kind_of(content, kinds)
    if kind is None:
        raise _refusal(file, "is", kinds=kinds, contents=[content])
    summary = kind.read(file)
    run = file.with_name(RUN)
    about = load_json(run) if file.name == SUMMARY and run.is_file() else {}
    return Source(name, file, kind, summary, hashlib.sha256(file.read_bytes()).hexdigest()[:12], about)
