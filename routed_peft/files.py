"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a place beside ``path`` to write to; at the end it is renamed to ``path``, unless writing failed.

    An interrupted write leaves the file that was there, and processes of one machine that write the same file do not mix.
    Directories on the way to it are made.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp(), "new", "numbers.json")
        >>> with written_whole(file) as aside:
        ...     _ = aside.write_text("{}")
        >>> file.read_text(), aside.exists()
        ('{}', False)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def in_use(path: Path) -> bool:
    """Return whether ``path`` is anything but missing or an empty directory."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as readable JSON, all of it or none."""
    with written_whole(path) as aside:
        aside.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError with the file's name where it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not readable JSON ({error}): truncated or edited; restore it from a copy"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected a JSON object; restore it from a copy")
    return data
