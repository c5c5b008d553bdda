"""Write directories aside and rename them, so that a full disk or an interruption leaves nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LAST = "routing.json"
"""Removed first and written last: a directory without it does not count as a saved run."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
NOTICE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> list[str]:
    """Return the sorted paths of all files under ``folder``, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def copy_matching(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of ``source`` that match ``patterns`` and do not exist in ``target``."""
    for pattern in patterns:
        for path in source.glob(pattern):
            copy = target / path.relative_to(source)
            if path.is_file() and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


@contextmanager
def atomic_directory(path: Path, ours: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty directory on the file system of ``path``; move its content to ``path`` if the block succeeds.

    A path that does not exist or is empty appears in one rename. At a path that holds files, only files of the same
    name and those in ``ours`` are replaced. An error while files are moved puts every file back.

    Args:
        path: directory.
        ours: files of an earlier save, relative to ``path``.

    Raises:
        OSError: writing or moving failed; ``path`` is as it was.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp(), "new")
        >>> with atomic_directory(folder) as aside:
        ...     _ = (aside / "numbers.json").write_text("{}")
        >>> files_in(folder)
        ['numbers.json']
    """
    path = path.resolve()
    fresh = not path.exists() or (path.is_dir() and not path.is_mount() and not any(path.iterdir()))
    parent = path.parent if fresh else path
    parent.mkdir(parents=True, exist_ok=True)
    aside = parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    aside.mkdir()
    try:
        yield aside
        _flush(aside)
        if not (fresh and _renamed(aside, path)):
            _swap(aside, path, ours)
        _flush_directory(parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _renamed(aside: Path, path: Path) -> bool:
    """Rename and return True, unless ``path`` got files in the meantime: other processes of a Trainer save there too."""
    try:
        os.rename(aside, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _flush(folder: Path) -> None:
    for name in files_in(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _flush_directory(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(aside: Path, path: Path, ours: Iterable[str]) -> None:
    new = sorted(files_in(aside), key=lambda name: name == LAST)
    old = sorted({*ours, *new}, key=lambda name: (name != LAST, name))
    backup = aside.with_suffix(".old")
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        moved.append((source, target))

    try:
        for name in old:
            if (path / name).is_file():
                move(path / name, backup / name)
        for name in new:
            move(aside / name, path / name)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise
    finally:
        if not files_in(backup):  # there were no files, or all are back
            shutil.rmtree(backup, ignore_errors=True)
    shutil.rmtree(backup, ignore_errors=True)
    for folder in {(path / name).parent for name in old} - {path}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
