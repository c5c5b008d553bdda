"""Writing directories: full disks, interruptions, and other writers."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checkpoint_parts import content, wrapped
from transformers import modeling_utils

from routed_peft.checkpoint import save as save_module
from routed_peft.checkpoint import save_routed
from routed_peft.checkpoint import staging as files_module
from routed_peft.checkpoint.staging import atomic_directory, copy_matching, inside, recover


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


@pytest.mark.parametrize("fail_at", range(1, 5))
def test_an_error_while_files_are_moved_leaves_old_or_new(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    old = {"routing.json": "old", "a": "old", "forget/b": "old", "gone/d": "old", "mine": "mine"}
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
        with atomic_directory(path, lambda: ["routing.json", "a", "forget/b", "gone/d"]) as aside:
            for name, text in new.items():
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(text)

    with pytest.raises(OSError, match="broken disk"):  # while the journal is renamed, and three files
        write()
    recover(path)
    expected = old if fail_at == 1 else {**new, "mine": "mine"}
    assert content(path) == {name: text.encode() for name, text in expected.items()}
    assert not [item for item in path.iterdir() if item.name.startswith(".") or item.name == "gone"] or fail_at == 1
    write()
    assert content(path) == {name: text.encode() for name, text in {**new, "mine": "mine"}.items()}


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path, order = tmp_path / "out", threading.Barrier(2)

    def write(name: str) -> str:
        order.wait()
        try:
            with atomic_directory(path, fresh=True) as aside:
                for part in ("1", "2"):
                    (aside / f"{name}{part}").write_text("")
                    time.sleep(0.05)
        except ValueError as error:
            return str(error)
        return name

    with ThreadPoolExecutor(2) as pool:
        results = sorted(pool.map(write, "ab"))
    assert sum("is not an empty directory" in result for result in results) == 1
    winner = min(results, key=len)
    assert [file.name for file in sorted(path.iterdir())] == [f"{winner}1", f"{winner}2"]


@pytest.mark.parametrize(
    "name", ["../mine", "/etc/passwd", "a/../../mine", "link/mine", "link", "..", ".", "", "a//b", "a\\b"]
)
def test_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/link").symlink_to(tmp_path)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="leads out of it"):
        inside(tmp_path / "run", name)
    assert inside(tmp_path / "run", "a/b.json") == tmp_path / "run/a/b.json"


def test_links_that_lead_out_are_not_copied(tmp_path: Path) -> None:
    for name in ("run", "out", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "other/a.jinja").write_text("secret")
    (tmp_path / "run/LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "run/additional_chat_templates").symlink_to(tmp_path / "other")
    (tmp_path / "run/NOTICE").write_text("mine")
    (tmp_path / "run/COPYING").symlink_to(tmp_path / "run/NOTICE")
    copy_matching(
        tmp_path / "run", tmp_path / "out", ("LICENSE*", "NOTICE*", "COPYING*", "additional_chat_templates/*.jinja")
    )
    assert content(tmp_path / "out") == {"NOTICE": b"mine", "COPYING": b"mine"}


def test_the_working_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_directory(Path()) as aside:
        (aside / "new").write_text("")
    assert os.listdir() == ["new"] and Path().resolve() == tmp_path.resolve()


def test_files_that_other_processes_write_meanwhile_stay(tmp_path):
    """Every process of a Trainer saves its random state into the checkpoint, and none waits for the first one's model."""
    path = tmp_path / "checkpoint-2"
    with atomic_directory(path) as aside:
        (aside / "routing.json").write_text("{}")
        path.mkdir(exist_ok=True)
        (path / "rng_state_1.pth").write_text("theirs")
    assert sorted(file.name for file in path.iterdir()) == ["rng_state_1.pth", "routing.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]
