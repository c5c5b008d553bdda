"""What experiments of many cells share: a directory for every cell, made once, and one file with the numbers of all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from routed_peft.files import write_json
from routed_peft.training import RunDirectory

ALL = "all"


def prepare(experiment: Any, settings: Any) -> tuple[RunDirectory, Path]:
    """Return the directory of an experiment, whose settings are recorded there, and that of its cells.

    Args:
        experiment: dataclass with ``output_dir`` and ``seeds``.
        settings: dataclass with what a cell depends on.
    """
    records = RunDirectory(Path(experiment.output_dir).expanduser().resolve())
    seeds = {f"seed {seed}": seed for seed in experiment.seeds}
    records.start({"experiment": asdict(experiment), **asdict(settings)}, seeds, resume=True)
    (records.path / "cells").mkdir(exist_ok=True)
    return records, records.path / "cells"


def ensure(folder: Path, make: Callable[[], Mapping[str, Any]], timeout: float = -1) -> dict[str, Any]:
    """Return the numbers of ``folder``, which ``make`` fills if it has not been.

    Args:
        folder: of a cell or a start model.
        make: fills the empty folder, and returns its numbers.
        timeout: seconds to wait for another process that is at it; by default as long as it takes.

    Raises:
        filelock.Timeout: after so long.
    """
    file = folder / "numbers.json"
    with FileLock(f"{folder}.lock", timeout=timeout):
        if not file.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an interruption left
            write_json(file, make())
    return read_numbers(folder)


def read_numbers(folder: Path) -> dict[str, Any]:
    """Return the numbers of a folder that has been filled."""
    numbers: dict[str, Any] = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    return numbers


def write_summary(experiment: Any, records: RunDirectory, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write the numbers of all cells to ``summary.json`` and to ``experiment.summary_file``; return them as read back."""
    plain: dict[str, Any] = json.loads(json.dumps(summary))  # keys as a reader finds them
    for file in [records.path / "summary.json", *([Path(experiment.summary_file)] if experiment.summary_file else [])]:
        write_json(file, plain, indent=1)
    return plain


def digest(*about: Any) -> str:
    """Return a short name for plain data.

    >>> digest({"steps": 200}) == digest({"steps": 200}), digest({"steps": 200}) == digest({"steps": 100})
    (True, False)
    """
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
