"""Kill a piece of work at every event of the file system."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

EVENTS = ("mkdir", "rmdir", "rename", "replace", "unlink", "remove", "fsync", "open")


@contextmanager
def _patched(wrap: Callable[[Callable[..., Any], Callable[..., bool]], Any]) -> Iterator[pytest.MonkeyPatch]:
    """Wrap every function that changes the file system; the wrapper gets a function that says whether a call writes."""

    def opens_to_write(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return not isinstance(file, int) and mode[0] in "wax"

    with pytest.MonkeyPatch.context() as patch:
        for name in EVENTS:
            patch.setattr(os, name, wrap(getattr(os, name), lambda *_, **__: True))
        opened = wrap(io.open, opens_to_write)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield patch


class Killed(BaseException):
    """The process would end here; every later event of the file system ends it, too, so that nothing is cleaned up."""


def kill_at(event: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` until its ``event``-th event of the file system; return whether it was killed there."""
    count = 0

    def counted(original: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += writes(*args, **kwargs)
            if count >= event:
                raise Killed
            return original(*args, **kwargs)

        return call

    with _patched(counted):
        try:
            work()
        except Killed:
            return True
    return False


def every_kill(prepare: Callable[[], Callable[[], Any]], stride: int = 1) -> Iterator[Callable[[], Any]]:
    """Kill the work of ``prepare()`` at its first event, prepare it anew, kill it at the second, …; yield it each time."""
    event = 1
    while kill_at(event, work := prepare()):
        yield work
        event += stride
    assert event > 5 * stride


def states_of_kills(work: Callable[[], Any], root: Path, copies: Path) -> list[Path]:
    """Run ``work`` to its end; return copies of ``root`` as a kill leaves it, at every event, each state once.

    Events are those of `kill_at`, before which torch and safetensors write files, too. What lies in a buffer is lost.
    """
    copies.mkdir()
    states: dict[str, Path] = {}
    busy = False

    def look() -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            state = _digest(root)
            if root.is_dir() and state not in states:
                states[state] = Path(shutil.copytree(root, copies / f"{len(states):03d}"))
        finally:
            busy = False

    def looking(original: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if writes(*args, **kwargs):
                look()
            return original(*args, **kwargs)

        return call

    with _patched(looking) as patch:
        for module in (torch, safetensors.torch):
            name = "save" if module is torch else "save_file"
            patch.setattr(module, name, looking(getattr(module, name), lambda *_, **__: True))
        work()
    assert len(states) > 5
    return list(states.values())


def spread(states: list[Path], count: int) -> list[Path]:
    """Return at most ``count`` states: all in which names of files differ as far as that goes, spread evenly otherwise."""
    kinds: dict[tuple[str, ...], Path] = {}
    for state in states:
        kinds.setdefault(tuple(_names(state)), state)
    first = list(kinds.values())
    chosen = first + [state for state in states if state not in first]
    if len(first) >= count:
        chosen = [first[round(i * (len(first) - 1) / (count - 1))] for i in range(count)]
    return sorted(set(chosen[:count]))


def restore(state: Path, root: Path) -> None:
    """Put a copy of ``root`` back into its place."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(state, root)


def _names(root: Path) -> list[str]:
    return sorted(re.sub(r"[0-9a-f]{16}", "*", path.relative_to(root).as_posix()) for path in root.rglob("*"))


def _digest(root: Path) -> str:
    digest = hashlib.sha256("\n".join(_names(root)).encode())
    for path in sorted(root.rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
