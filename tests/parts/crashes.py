"""Kill a piece of work at every event of the file system."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

EVENTS = ("mkdir", "rmdir", "rename", "replace", "unlink", "remove", "fsync", "open")


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

    def opens_to_write(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return not isinstance(file, int) and mode[0] in "wax"

    with pytest.MonkeyPatch.context() as patch:
        for name in EVENTS:
            patch.setattr(os, name, counted(getattr(os, name), lambda *_, **__: True))
        opened = counted(io.open, opens_to_write)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
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
