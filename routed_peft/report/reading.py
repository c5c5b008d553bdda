"""Summaries of attacks, read from files and directories."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routed_peft.evaluation.relearning.summary import KIND
from routed_peft.runs.records import SUMMARY


@dataclass(frozen=True)
class Source:
    """One summary.

    Attributes:
        name: for readers and file names, different for every source of a report.
        file: where it was read.
        summary: what it holds.
        digest: the first digits of the file's SHA-256.
        run: what the ``run.json`` beside it holds; empty where there is none.
    """

    name: str
    file: Path
    summary: Mapping[str, Any]
    digest: str
    run: Mapping[str, Any]

    @property
    def relearning(self) -> bool:
        """Whether it is of attacks on one checkpoint, and not of an experiment."""
        return self.summary.get("kind") == KIND


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON ({error}): was it cut short? Write it anew") from None


def _names(files: Sequence[Path]) -> list[str]:
    """Name every file after itself, or after its folder where it is one ``summary.json`` of many.

    >>> _names([Path("/r/biology.json"), Path("/a/rmu/summary.json"), Path("/b/rmu/summary.json")])
    ['biology', 'rmu', 'rmu-2']
    """
    names: list[str] = []
    for file in files:
        plain = file.parent.name if file.name == SUMMARY else file.stem
        same = sum(name == plain or name.startswith(f"{plain}-") for name in names)
        names.append(f"{plain}-{same + 1}" if plain in names else plain)
    return names
