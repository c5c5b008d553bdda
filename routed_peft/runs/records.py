"""What a run leaves to read: ``run.json`` (how), ``metrics.jsonl`` (what happened), ``summary.json`` (what came of it)."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from routed_peft.files import in_use, read_json, write_bytes, write_json
from routed_peft.runs.provenance import _LIBRARIES, hardware, versions

PLAIN_ARMS = ("none", "filter", "perfect_filter")
PLACEBO = "placebo.json"

RECORD = "ablation.json"

RUN, METRICS, SUMMARY = "run.json", "metrics.jsonl", "summary.json"


class RunDirectory:
    """The records of one run, in a directory that may hold other files too.

    ``run.json`` and ``summary.json`` are written aside and renamed; ``metrics.jsonl`` grows by whole lines, so that what
    was measured before an interruption stays readable. Numbers that are not finite are written as null.

    Args:
        path: directory; made by the first write.

    Example:
        >>> import tempfile
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.start({"method": "sgtm"}, seeds={"seed": 0})
        >>> run.log(arm="routed", split="forget", step=10, loss=2.5)
        >>> run.finish({"forget": 2.5})
        >>> run.points()
        [{'arm': 'routed', 'split': 'forget', 'step': 10, 'loss': 2.5}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().resolve()

    def start(
        self,
        config: Mapping[str, Any],
        seeds: Mapping[str, int],
        command: Sequence[str] | None = None,
        resume: bool = False,
        same: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``run.json``, and begin the points anew unless the run resumes.

        Args:
            config: everything that was set; what JSON cannot say is written as its string.
            seeds: by name.
            command: arguments that started the run; those of this process by default.
            resume: keep the points there are.
            same: that part of the config which a run that resumes must have been begun with, see `check_same`.

        Raises:
            ValueError: if the directory holds the records of a run that has finished, or was begun otherwise.
        """
        if resume and same is not None:
            self.check_same(same)
        self._check_unfinished(resume)
        about = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.orig_argv if command is None else command),
            "config": dict(config),
            "seeds": dict(seeds),
            "versions": {
                "python": platform.python_version(),
                **versions(),
                **{name: version(name) for name in _LIBRARIES},
            },
            "hardware": hardware(),
        }
        write_json(self.path / RUN, _plain(about))
        if not resume:
            (self.path / METRICS).unlink(missing_ok=True)

    def check_apart(self, source: str | os.PathLike[str], resume: bool = False) -> None:
        """Raise ValueError where a model made from ``source`` would take the place of something else in this directory.

        That is ``source`` itself, a finished run that is not resumed, or files that no run left there.

        Example:
            >>> RunDirectory("run").check_apart("run")
            Traceback (most recent call last):
            ...
            ValueError: ... is where the model comes from: it would be overwritten; name another directory
        """
        if self.path == Path(source).expanduser().resolve():
            raise ValueError(
                f"{self.path} is where the model comes from: it would be overwritten; name another directory"
            )
        self._check_unfinished(resume)
        if in_use(self.path) and not (self.path / RUN).is_file():
            raise ValueError(
                f"{self.path} holds files, and no run to continue ({RUN}): name a new directory, or an empty one"
            )

    def _check_unfinished(self, resume: bool) -> None:
        if (self.path / SUMMARY).exists() and not resume:
            raise ValueError(
                f"{self.path} holds a finished run ({SUMMARY}): name another directory, resume it, or move it away"
            )

    def check_same(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError where ``run.json`` tells of another ``config``, in what both of them name: of a run that resumes.

        Example:
            >>> import tempfile
            >>> run = RunDirectory(tempfile.mkdtemp())
            >>> run.start({"recipe": {"alpha": 0.1}, "logging": 10}, seeds={})
            >>> run.check_same({"recipe": {"alpha": 0.2}})
            Traceback (most recent call last):
            ...
            ValueError: ... holds a run with other settings, `alpha` 0.1 where 0.2 is asked for: repeat the command as it ...
        """
        if not (self.path / RUN).is_file():
            return
        before = read_json(self.path / RUN).get("config", {})
        _check_same(self.path, before, _plain(config))

    def log(self, **point: Any) -> None:
        """Append one point to ``metrics.jsonl``, in place of a last line that an interruption cut short."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not _ends_whole(self.path / METRICS):
            self.keep(lambda point: True)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(point)) + "\n")

    def points(self) -> list[dict[str, Any]]:
        """Read the points back; a last line that an interruption cut short is left out."""
        if not (self.path / METRICS).exists():
            return []
        lines = (self.path / METRICS).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last line break is no whole line

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the points that are not ``wanted``: those after the checkpoint from which a run resumes, say."""
        kept = [point for point in self.points() if wanted(point)]
        write_bytes(self.path / METRICS, "".join(json.dumps(point) + "\n" for point in kept).encode())

    def ablation_target(self, asked: str | None = None) -> Path | None:
        """Return where the ablated model goes: ``asked``, by default beside the run; nowhere if that is "no".

        Call it before training, for it is then that one wants to hear of a directory that is in use.

        Raises:
            ValueError: where that is not free.

        Example:
            >>> RunDirectory("run").ablation_target().name, RunDirectory("run").ablation_target("no")
            ('run-ablated', None)
        """
        if asked == "no":
            return None
        target = Path(asked or f"{self.path}-ablated").expanduser()
        if in_use(target):
            raise ValueError(f"`ablate_to` {target} is not empty: name another directory, or `no`")
        return target

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / SUMMARY, _plain(summary))


def _ends_whole(file: Path) -> bool:
    """Return whether a file is missing, empty, or ends with a line break."""
    if not file.exists() or not file.stat().st_size:
        return True
    with file.open("rb") as lines:
        lines.seek(-1, os.SEEK_END)
        return lines.read() == b"\n"


class RunRecorder(TrainerCallback):
    """Appends what a Trainer logs to ``metrics.jsonl``: one point per training log and per evaluated split.

    A point has ``split`` ("train", or the name of the evaluation set), ``ablated`` (whether regions were off), ``step``,
    ``tokens`` (where ``include_num_input_tokens_seen`` is on), the metrics without their prefix, and ``names``.

    Args:
        run: where to.
        **names: what every point of this run says of itself, such as ``method="sgtm", arm="routed"``.

    Example:
        >>> import tempfile
        >>> recorder = RunRecorder(RunDirectory(tempfile.mkdtemp()), arm="routed")
        >>> state = TrainerState(global_step=5, is_world_process_zero=True)
        >>> recorder.on_log(TrainingArguments(), state, TrainerControl(), {"eval_ablated_forget_loss": 4.0, "epoch": 1})
        >>> recorder.run.points()
        [{'arm': 'routed', 'split': 'forget', 'ablated': True, 'step': 5, 'loss': 4.0, 'epoch': 1}]
    """

    def __init__(self, run: RunDirectory, **names: Any) -> None:
        self.run, self.names = run, names

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the points that come after the step at which training resumes."""
        if state.is_world_process_zero:
            self.run.keep(lambda point: point.get("step", 0) <= state.global_step or not self._ours(point))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a point."""
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # the last is a mean over the run
            return
        split, ablated, prefix = _split(logs)
        metrics = {key.removeprefix(prefix): value for key, value in logs.items() if key != "num_input_tokens_seen"}
        tokens = {} if args.include_num_input_tokens_seen == "no" else {"tokens": state.num_input_tokens_seen}
        self.run.log(**self.names, split=split, ablated=ablated, step=state.global_step, **tokens, **metrics)

    def _ours(self, point: Mapping[str, Any]) -> bool:
        return all(point.get(name) == value for name, value in self.names.items())


def _check_same(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in sorted(before.keys() & now.keys()):
        if isinstance(now[key], Mapping) and isinstance(before[key], Mapping):
            _check_same(place, before[key], now[key])
        elif before[key] != now[key]:
            raise ValueError(
                f"{place} holds a run with other settings, `{key}` {before[key]!r} where {now[key]!r} is asked for: repeat the "
                "command as it was, or name another directory"
            )


def _split(logs: Mapping[str, Any]) -> tuple[str, bool, str]:
    """Return the split that logs are of, whether regions were ablated, and the prefix of its metrics."""
    key = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), None)
    if key is None:
        return "train", False, ""
    prefix = key.removesuffix("loss")
    name = prefix.removeprefix("eval_")
    ablated = name.startswith("ablated_")
    return name.removeprefix("ablated_").rstrip("_") or "eval", ablated, prefix


def _plain(value: Any) -> Any:
    """Make plain data of ``value``: JSON knows no NaN, no tuples and no paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _plain(value.item())
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def run_of(src: str | Path) -> Path:
    """Return the directory with the records of a model: its own, or that of the run from which it was ablated.

    >>> run_of("nowhere").name
    'nowhere'
    """
    folder = Path(src).expanduser()
    for record in (RECORD, PLACEBO):
        if (folder / record).is_file() and not (folder / RUN).is_file():
            source = read_json(folder / record).get("source")
            return folder if source is None else Path(source).expanduser()
    return folder


def recipe_of(src: str | Path) -> dict[str, Any]:
    """Return what the recipe that trained a model was told, as its ``run.json`` has it; empty where that is not known.

    >>> recipe_of("nowhere")
    {}
    """
    file = run_of(src) / RUN
    if not file.is_file():
        return {}
    config = read_json(file).get("config", {})
    return dict(config.get("recipe", config))


def own_regions(src: str | Path) -> tuple[()] | Literal["all"]:
    """Return the regions that belong to a model: none of a routed run; all where an arm was trained without routing.

    The units of such an arm (``--arm none``, ``filter``, ``perfect_filter``) learnt what the rest of the model did.

    >>> own_regions("nowhere")
    ()
    """
    return "all" if recipe_of(src).get("arm") in PLAIN_ARMS else ()
