"""Files of a run: ``run.json`` (settings), ``metrics.jsonl`` (measurements) and ``summary.json`` (results)."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routed_peft.files import HIDDEN, check_writable, in_use, read_json, write_bytes, write_json
from routed_peft.runs.provenance import all_versions, hardware

RUN, METRICS, SUMMARY = "run.json", "metrics.jsonl", "summary.json"
ABLATION = "ablation.json"  # record of an exported model, which names its run
PLACEBO = "placebo.json"  # record of a model with silenced units, likewise

_SECRET = re.compile(r"(--?)?(\w+[-_])?(?<!eos_)(?<!bos_)(?<!pad_)(token|api[-_]?key|password|secret)", re.I)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{12,}")


class RunDirectory:
    """Records of one run, in a directory that may hold other files too.

    ``run.json`` and ``summary.json`` are written aside and renamed. ``metrics.jsonl`` grows by whole lines, so that
    measurements before an interruption stay readable. Numbers that are not finite are written as null.

    >>> import tempfile
    >>> run = RunDirectory(tempfile.mkdtemp())
    >>> run.start({"method": "sgtm"}, seeds={"seed": 0})
    >>> run.log(arm="routed", split="forget", step=10, loss=2.5)
    >>> run.finish({"forget": 2.5})
    >>> run.points()
    [{'arm': 'routed', 'split': 'forget', 'step': 10, 'loss': 2.5}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise ValueError("the directory of the run is an empty name: give one, in `output_dir` or `out`")
        self.path = Path(path).expanduser().resolve()

    def start(
        self,
        config: Mapping[str, Any],
        seeds: Mapping[str, int],
        *,
        command: Sequence[str] | None = None,
        resume: bool = False,
        same: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``run.json``, and delete earlier points unless the run resumes.

        Args:
            config: all settings; values that JSON cannot hold are written as strings.
            command: arguments that started the run; by default those of this process.
            same: part of the config that a resumed run must share with its beginning, see `check_same`.

        Raises:
            ValueError: the directory holds a finished run, or one that began with other settings.
        """
        if resume and same is not None:
            self.check_same(same)
        self._check_unfinished(resume)
        about = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(_without_tokens(sys.orig_argv if command is None else command)),
            "config": dict(config),
            "seeds": dict(seeds),
            "versions": all_versions(),
            "hardware": hardware(),
        }
        for left in self.path.glob(f"{HIDDEN}*.tmp"):  # of a kill
            left.unlink(missing_ok=True)
        write_json(self.path / RUN, _plain(about))
        if not resume:
            (self.path / METRICS).unlink(missing_ok=True)

    def check_separate(self, source: str | os.PathLike[str], resume: bool = False) -> None:
        """Raise ValueError if writing a model made from ``source`` would overwrite something in this directory.

        Refused are ``source`` itself, a finished run that is not resumed, and files that do not belong to a run.
        """
        if self.path == Path(source).expanduser().resolve():
            raise ValueError(f"{self.path} is the source of the model and would be overwritten: name another directory")
        self._check_unfinished(resume)
        if in_use(self.path) and not (self.path / RUN).is_file():
            raise ValueError(f"{self.path} holds files but no run to continue ({RUN}): name a new or an empty "
                             "directory")  # fmt: skip

    def _check_unfinished(self, resume: bool) -> None:
        if (self.path / SUMMARY).exists() and not resume:
            raise ValueError(f"{self.path} holds a finished run ({SUMMARY}): name another directory, resume it, or "
                             "move it away")  # fmt: skip

    def check_same(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError if ``run.json`` and ``config`` differ in a setting that both of them have."""
        if (self.path / RUN).is_file():
            _check_same(self.path, read_json(self.path / RUN).get("config", {}), _plain(config))

    def log(self, **point: Any) -> None:
        """Append one point to ``metrics.jsonl``; it replaces a last line that an interruption cut short."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not _ends_whole(self.path / METRICS):
            self.keep(lambda point: True)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(point)) + "\n")

    def points(self) -> list[dict[str, Any]]:
        """Return all points, without a last line that an interruption cut short."""
        file = self.path / METRICS
        lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []  # until the last line break
        return [json.loads(line) for line in lines]

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the points that are not ``wanted``, such as those after the checkpoint from which a run resumes."""
        kept = [point for point in self.points() if wanted(point)]
        write_bytes(self.path / METRICS, "".join(json.dumps(point) + "\n" for point in kept).encode())

    def ablation_target(self, asked: str | None = None) -> Path | None:
        """Return the directory for the ablated model: ``asked``, or one beside the run; None for "no".

        Call it before training, so that it refuses early a directory that is not empty, lies in that of the run or holds it
        (ValueError), or cannot be written (OSError). What this run wrote there before it was interrupted is removed.

        >>> RunDirectory("run").ablation_target().name, RunDirectory("run").ablation_target("no")
        ('run-ablated', None)
        """
        if asked == "no":
            return None
        target = Path(asked or f"{self.path}-ablated").expanduser().resolve()
        if target == self.path or self.path in target.parents or target in self.path.parents:
            raise ValueError(f"`ablate_to` {target} and the run's own directory {self.path} lie in each other: name a "
                             "directory beside it")  # fmt: skip
        check_writable(target)
        if not (self.path / SUMMARY).exists():
            for record in (ABLATION, PLACEBO):
                self._remove_own(target / record)
        if in_use(target):
            raise ValueError(f"`ablate_to` {target} is not empty: name another directory, or `no`")
        return target

    def _remove_own(self, record: Path) -> None:
        """Remove a model that this run wrote, by the list of files in its record."""
        about = read_json(record) if record.is_file() else {}
        if about.get("source") is not None and Path(about["source"]).expanduser().resolve() == self.path:
            for name in [*about.get("sha256", {}), record.name]:  # the record last, which knows the others
                if ".." not in Path(name).parts and (record.parent / name).resolve().is_relative_to(record.parent):
                    (record.parent / name).unlink(missing_ok=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / SUMMARY, _plain(summary))


def _without_tokens(command: Sequence[str]) -> list[str]:
    """Return the arguments of a command without tokens, keys and passwords."""
    shown: list[str] = []
    for word in command:
        secret = bool(shown) and _SECRET.fullmatch(shown[-1]) is not None
        name, equals, _ = word.partition("=")
        word = f"{name}=***" if equals and _SECRET.fullmatch(name) else "***" if secret else word
        shown.append(_TOKEN.sub("***", word))
    return shown


def _ends_whole(file: Path) -> bool:
    """Return whether a file is missing, empty, or ends with a line break."""
    with file.open("a+b") as lines:
        lines.seek(max(lines.tell() - 1, 0))
        return lines.read() in (b"", b"\n")


def _check_same(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted(before.keys() & now.keys()):
        if isinstance(now[key], Mapping) and isinstance(before[key], Mapping):
            _check_same(place, before[key], now[key])
        elif before[key] != now[key]:
            raise ValueError(f"{place} holds a run with other settings: `{key}` is {before[key]!r} there, got "
                             f"{now[key]!r}. Repeat the original command, or name another directory")  # fmt: skip


def _plain(value: Any) -> Any:
    """Return ``value`` as data that JSON can hold: without NaN, tuples and paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def records_directory(src: str | Path) -> Path:
    """Return the directory with the records of a model: its own, or that of the run from which it was ablated."""
    folder = Path(src).expanduser()
    for record in (ABLATION, PLACEBO):
        if (folder / record).is_file() and not (folder / RUN).is_file():
            source = read_json(folder / record).get("source")
            return folder if source is None else Path(source).expanduser()
    return folder


def read_recipe(src: str | Path) -> dict[str, Any]:
    """Return the settings of the recipe that trained a model, from its ``run.json``; empty without one."""
    file = records_directory(src) / RUN
    config = read_json(file).get("config", {}) if file.is_file() else {}
    return dict(config.get("recipe", config))
