"""Read JSON, and write files so that an interruption leaves the old file or the new one, never a part."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routed_peft.mistakes import check_shape

HIDDEN = ".routed_peft-"
"""Beginning of the names of files and directories that are being written; random digits follow."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it is renamed to ``path`` at the end of the block, unless that raises.

    An interrupted write leaves the previous file as it was. Processes that write the same file do not mix.
    Missing parent directories are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{HIDDEN}{secrets.token_hex(8)}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def journals(path: Path) -> list[Path]:
    """Return the journals of saves into the directory ``path`` that were decided and then interrupted."""
    return sorted(path.glob(f"{HIDDEN}{'[0-9a-f]' * 16}.json"))


def in_use(path: Path) -> bool:
    """Return whether ``path`` exists and is not an empty directory; the remains of an interrupted write do not count."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    ours = {Path(name).parts[0] for journal in journals(path) for name in read_json(journal)["move"]}
    return any(entry.name not in ours and not entry.name.startswith(HIDDEN) for entry in path.iterdir())


def check_writable(path: Path) -> None:
    """Raise OSError unless files can be made in ``path``, or in the directory where it will be made."""
    while not path.exists() and path.parent != path:
        path = path.parent
    with tempfile.TemporaryFile(dir=path):
        pass


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` by `atomic_write`."""
    with atomic_write(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, data: Any, **options: Any) -> None:
    """Write ``data`` as indented JSON by `atomic_write`; ``options`` are those of `json.dumps`."""
    write_bytes(path, (json.dumps(data, **{"indent": 2, **options}) + "\n").encode())


def read_json(path: Path, shape: Any = None) -> dict[str, Any]:
    """Read a JSON object; ValueError with the file's name if it is none, or not of the ``shape`` (see `check_shape`)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): truncated or edited; restore it from a "
                         "copy") from error  # fmt: skip
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected a JSON object; restore it from a copy")
    if shape is not None:
        try:
            check_shape(data, shape, str(path))
        except ValueError as error:
            raise ValueError(f"{error}: restore the file from a copy") from None
    return data
