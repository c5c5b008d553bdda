"""Which files a report is about: the summaries of experiments and of relearning, found, read and checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routed_peft.evaluation.relearning.summary import KIND, read_summary
from routed_peft.report.reading import Source, _load, _names
from routed_peft.runs.records import RUN, SUMMARY

EXPERIMENT_FORMAT = 1
_EXPERIMENT = {"experiment", "settings", "cells"}
_CELL = ("method", "seed", "labeled", "recall", "precision", "forget_loss", "retain_loss")
_CURVE = ("learning_rate", "status", "steps", "forget_losses", "retain_losses")


def read_sources(places: Sequence[str | Path]) -> list[Source]:
    """Read summaries.

    Args:
        places: files; and directories, of which every summary counts: ``*.json`` in it and ``summary.json`` in the folders
            directly below. Other files there are passed over.

    Raises:
        ValueError: where there is nothing, a file that was named is no summary, a directory holds none, or a summary is of
            another format or damaged. The message names the file.
    """
    if not places:
        raise ValueError("a report needs at least one summary: name files, or directories that hold some")
    files: dict[Path, Path] = {}
    for place in map(Path, places):
        if place.is_dir():
            found = [file for file in _candidates(place) if _counts(file)]
            if not found:
                raise ValueError(
                    f"{str(place)!r} holds no summary: recipes/experiment.py writes one to its `summary_file`, and "
                    "`routed-peft relearn` to its `--out` directory"
                )
            files |= {file.resolve(): file for file in found if file.resolve() not in files}
        elif place.is_file():
            files.setdefault(place.resolve(), place)
        else:
            raise ValueError(f"{str(place)!r} is not there: name summaries, or directories that hold some")
    names = _names(list(files))
    return [_read(file, name) for file, name in zip(files.values(), names, strict=True)]


def _candidates(folder: Path) -> Iterable[Path]:
    return sorted(file for file in (*folder.glob("*.json"), *folder.glob(f"*/{SUMMARY}")) if file.is_file())


def _counts(file: Path) -> bool:
    """Say whether a file of a directory is a summary; one that is called summary.json must be whole."""
    try:
        return _is_summary(_load(file))
    except ValueError:
        if file.name == SUMMARY:
            raise
        return False


def _is_summary(content: Any) -> bool:
    return isinstance(content, dict) and (content.get("kind") == KIND or content.keys() >= _EXPERIMENT)


def _read(file: Path, name: str) -> Source:
    content = _load(file)
    if not _is_summary(content):
        raise ValueError(
            f"{str(file)!r} is no summary of an experiment or of relearning: such a file is written by "
            "recipes/experiment.py or `routed-peft relearn`"
        )
    if content.get("kind") == KIND:
        content = read_summary(file)
    else:
        _check_experiment(content, file)
    run = file.with_name(RUN)
    about = _load(run) if file.name == SUMMARY and run.is_file() else {}
    return Source(name, file, content, hashlib.sha256(file.read_bytes()).hexdigest()[:12], about)


def read_experiment(file: Path) -> dict[str, Any]:
    """Read the summary of an experiment that may still be going on; its cells are not checked.

    Raises:
        ValueError: it is of something else, or of another version of this library.
    """
    content = _load(file)
    if not isinstance(content, dict) or not content.keys() >= _EXPERIMENT:
        raise ValueError(f"{str(file)!r} is no summary of an experiment: name another file, or move it away")
    _check_format(content, file)
    return content


def _check_format(content: Mapping[str, Any], file: Path) -> None:
    if content.get("format") != EXPERIMENT_FORMAT:
        raise ValueError(
            f"{str(file)!r} has the format {content.get('format')!r}, this version of routed_peft reads "
            f"{EXPERIMENT_FORMAT}: move it away and run recipes/experiment.py again (finished cells are kept)"
        )


def _check_experiment(content: Mapping[str, Any], file: Path) -> None:
    _check_format(content, file)
    if not content["cells"]:
        raise ValueError(f"{str(file)!r} has no finished cell yet: wait for the first, or name another file")
    seen = set()
    for number, cell in enumerate(content["cells"], 1):
        where = f"cell {number} of {str(file)!r}"
        if missing := [key for key in _CELL if key not in cell]:
            raise ValueError(f"{where} lacks {', '.join(missing)}: was the file changed by hand?")
        for key in ("forget_loss", "retain_loss"):
            if not isinstance(cell[key], int | float) or not math.isfinite(cell[key]):
                raise ValueError(f"{where} has the `{key}` {cell[key]!r}: a loss must be a finite number")
        identity = tuple(cell[key] for key in _CELL[:5])
        if identity in seen:
            raise ValueError(f"{where} is there twice, as {dict(zip(_CELL, identity, strict=False))}")
        seen.add(identity)
        for attack, curves in cell.get("attacks", {}).items():
            if not curves or any(key not in curve for curve in curves for key in _CURVE):
                raise ValueError(f"the attack {attack!r} of {where} needs curves with {', '.join(_CURVE)}")
