"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
