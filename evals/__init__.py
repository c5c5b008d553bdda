"""lm-eval tasks for models with removable regions: losses and multiple choice, forget side and retain side."""

from __future__ import annotations

from pathlib import Path


def path() -> str:
    """Return the directory to give to lm-eval's ``--include_path``.

    >>> sorted(p.name for p in Path(path()).glob("routed_*_loss.yaml"))
    ['routed_forget_loss.yaml', 'routed_retain_loss.yaml']
    """
    return str(Path(__file__).parent)
