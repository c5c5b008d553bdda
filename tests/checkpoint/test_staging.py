"""Writing directories: full disks, interruptions, and other writers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import content, wrapped
from transformers import modeling_utils

from routed_peft.checkpoint import save as save_module
from routed_peft.checkpoint import save_routed
from routed_peft.checkpoint import staging as files_module
from routed_peft.checkpoint.staging import atomic_directory


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [full_disk, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)])
def test_a_full_disk_or_an_interruption_leaves_all_as_it_was(
    exists: bool, error: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    if exists:
        save_routed(wrapped("mlp"), path, train_base=True)
    before = content(tmp_path)
    other = wrapped("mlp", seed=3)
    steps: list[tuple[Any, str]] = [
        (modeling_utils, "safe_save_file"),
        (save_module, "save_file"),
        (save_module, "write_json"),
        (files_module, "_flush"),
    ]
    for module, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, error)
            with pytest.raises((OSError, KeyboardInterrupt)):
                save_routed(other, path, train_base=True)
        assert content(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([path] if exists else [])


@pytest.mark.parametrize("fail_at", range(1, 12))
def test_an_error_while_files_are_moved_puts_them_back(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    old = {"routing.json": "old", "a": "old", "forget/b": "old", "mine": "mine"}
    for name, text in old.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fail_at:
            raise OSError(errno.EIO, "broken disk")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    new = {"routing.json": "new", "forget/b": "new", "c": "new"}

    def write() -> None:
        with atomic_directory(path, ["routing.json", "a", "forget/b"]) as aside:
            for name, text in new.items():
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(text)

    if fail_at <= 6:  # three files out, three in
        with pytest.raises(OSError, match="broken disk"):
            write()
        assert content(path) == {name: text.encode() for name, text in old.items()}
    else:
        write()
        assert content(path) == {name: text.encode() for name, text in {**new, "mine": "mine"}.items()}
    assert {item.name for item in path.iterdir()} <= {"routing.json", "a", "c", "forget", "mine"}


def test_files_that_other_processes_write_meanwhile_stay(tmp_path):
    """Every process of a Trainer saves its random state into the checkpoint, and none waits for the first one's model."""
    path = tmp_path / "checkpoint-2"
    with atomic_directory(path) as aside:
        (aside / "routing.json").write_text("{}")
        path.mkdir()
        (path / "rng_state_1.pth").write_text("theirs")
    assert sorted(file.name for file in path.iterdir()) == ["rng_state_1.pth", "routing.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]
