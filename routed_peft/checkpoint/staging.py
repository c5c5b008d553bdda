"""Write directories so that a kill at any moment leaves the old files or the new ones, and never a mixture.

New files are written into a hidden directory with a random name inside the target. The rename of a journal decides: before
it the old files stand, after it the new ones. Files then move into place, which can be repeated; the journal goes last.
Whoever next opens the target completes a journal that is there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from routed_peft.files import HIDDEN, in_use, journals, read_json

try:
    import fcntl
except ImportError:  # Windows, which cannot open a directory either
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LAST = "routing.json"
"""Moved last: a directory without it does not count as a saved run."""

COMPANIONS = tuple(
    "LICENSE* LICENCE* NOTICE* COPYING* tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model qwen.tiktoken "
    "chat_template.jinja chat_template.json additional_chat_templates/*.jinja".split()
)
"""Files of a license or tokenizer, which go wherever the weights go."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> list[str]:
    """Return the sorted paths of all files under ``folder``, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def inside(root: Path, name: str) -> Path:
    """Return the path of the file ``name`` under ``root``; ValueError if it leads out, but for links of the Hub's cache."""
    path, home = root / str(name), root.resolve()
    homes = [home, *(folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots")]
    plain = isinstance(name, str) and "\\" not in name and PurePosixPath(name).as_posix() == name and name != "."
    if not plain or ".." in path.parts[len(root.parts) :] or not any(map(path.resolve().is_relative_to, homes)):
        raise ValueError(f"{name!r} is named as a file of {root}, but leads out of it: do not use this directory, or "
                         "remove the name or link if you trust where it comes from")  # fmt: skip
    return path


def check_free(out: Path) -> None:
    """Raise ValueError unless ``out`` is missing or an empty directory; see `in_use`."""
    if in_use(out):
        raise ValueError(f"`out` {out} exists and is not an empty directory: name another, or empty it yourself")


def copy_matching(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of ``source`` that match ``patterns`` and do not exist in ``target``; links out of it are left."""
    for pattern in patterns:
        for path in source.glob(pattern):
            name = path.relative_to(source)
            with suppress(ValueError):
                if inside(source, name.as_posix()).is_file() and not (target / name).exists():
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target / name)


@contextmanager
def atomic_directory(path: Path, ours: Callable[[], Iterable[str]] = tuple, *, fresh: bool = False) -> Iterator[Path]:
    """Yield an empty directory on the file system of ``path``; its files become those of ``path`` if the block succeeds.

    Only one process at a time writes into ``path``, which is made if it does not exist; others wait. Files of the same name
    are replaced, and those of an earlier save, which ``ours`` returns when no other process writes. With ``fresh``, files
    that are not the result of an interrupted write are refused (ValueError), as is a directory in the place of a file. An
    error within the block, or a kill, leaves ``path`` as it was; where moving fails, the next who opens it completes it.
    """
    path = path.resolve()
    with _locked(path) as alone:
        if fresh:
            check_free(path)
        former = [name for journal in journals(path) for name in _complete(path, journal)]
        replaced = {*ours(), *(former if fresh else ())}
        for left in leftovers(path) if alone else ():
            shutil.rmtree(left)
        aside = path / f"{HIDDEN}{secrets.token_hex(8)}"
        journal = aside.with_suffix(".json")
        aside.mkdir()
        try:
            yield aside
            _decide(path, aside, replaced=replaced, journal=journal)
        except BaseException:
            if not journal.exists():
                shutil.rmtree(aside, ignore_errors=True)
            raise
        _complete(path, journal)


def recover(path: Path) -> None:
    """Complete a save into ``path`` that was decided and then interrupted, if there is one; OSError if that cannot be."""
    if journals(path):
        with _locked(path.resolve()):
            for journal in journals(path):
                _complete(path.resolve(), journal)


def leftovers(path: Path) -> list[Path]:
    """Return hidden directories that interrupted saves into ``path`` left, which may hold copies of regions."""
    digits = "[0-9a-f]"
    older = f".{glob.escape(path.name)}.{digits * 8}.tmp"  # names of earlier versions
    found = [*path.glob(f"{HIDDEN}{digits * 16}"), *path.glob(older), *path.parent.glob(older)]
    found = [left for left in found if left.is_dir() and not left.is_symlink()]
    return [left for left in found if not left.with_suffix(".json").exists()]


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a directory, made if it is missing, and remove it if it is empty; yield whether there is a lock.

    The lock is on the directory itself, so that it ends with the process and leaves no file. Network file systems that
    have no such lock go without.
    """
    made = not path.exists()
    handle, alone = _open_locked(path)
    with ExitStack() as stack:
        if handle is not None:
            stack.callback(os.close, handle)
            if alone:
                stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # a forked process may hold the handle, too
        try:
            yield alone
        finally:
            if made and not any(path.iterdir()):
                path.rmdir()


def _open_locked(path: Path) -> tuple[int | None, bool]:
    """Return an open directory, and whether it could be locked."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None, False
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            alone = _lock(handle, path)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle, alone
            os.close(handle)  # its owner removed it while this process waited


def _lock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning(f"another process writes into {path}: waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _decide(path: Path, aside: Path, *, replaced: set[str], journal: Path) -> None:
    """Write the journal and rename it into place."""
    new = files_in(aside)
    for name in {*new, *replaced}:
        if inside(path, name).is_dir():
            raise ValueError(f"{path / name} is a directory, and a file of that name would replace it: move it away")
    content = {"move": sorted(new, key=lambda name: name == LAST), "remove": sorted(replaced - set(new))}
    note = aside / journal.name
    note.write_text(json.dumps(content), encoding="utf-8")
    _flush(aside)
    os.replace(note, journal)
    _flush_directory(path)


def _complete(path: Path, journal: Path) -> list[str]:
    """Move the files of a journal into place and remove it; return their names. It can be repeated after a kill."""
    content, aside = read_json(journal), journal.with_suffix("")
    for name in content["remove"]:
        inside(path, name).unlink(missing_ok=True)
    for name in content["move"]:
        source, target = aside / name, inside(path, name)
        if inside(aside, name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    for folder in {(path / name).parent for name in content["remove"]} - {path}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    _flush_directory(path)
    journal.unlink(missing_ok=True)
    return list(content["move"])


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
