"""Mistakes of users: bounds on settings, and errors told in one line."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

EXTRAS = {"lm_eval": "eval", "pandas": "report", "sklearn": "classifiers", "trl": "trl"}
"""The extra of this package that installs each optional module."""
_OURS = (TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, NameError)


def explain(error: BaseException) -> str:
    """Return an error as one line that every terminal can show.

    An error that speaks of code rather than of its input is marked as unexpected.

    >>> explain(ValueError("`size` must be at least 1,\\n got 0")), explain(KeyError("size"))
    ('`size` must be at least 1, got 0', "unexpected KeyError: 'size' (`--debug` shows where)")
    """
    words = " ".join([*getattr(error, "__notes__", []), str(error)]).split()  # such as: no directory
    text = " ".join(words).encode("utf-8", "backslashreplace").decode() or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").split(".")[0])):
        return f'{text} (pip install "routed_peft[{extra}]")'
    return f"unexpected {type(error).__name__}: {text} (`--debug` shows where)" if isinstance(error, _OURS) else text


def check_numbers(settings: Any, *names: str, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ValueError where a field of ``settings`` is no number from ``low`` to ``high``; None passes.

    Example:
        >>> from types import SimpleNamespace
        >>> check_numbers(SimpleNamespace(share=1.5), "share", high=1)
        Traceback (most recent call last):
        ...
        ValueError: `share` must be a number from 0 to 1, got 1.5
    """
    for name in names:
        value = getattr(settings, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high and math.isfinite(value)):
            expected = f"from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
            raise ValueError(f"`{name}` must be a number {expected}, got {value!r}")


def check_choices(settings: Any) -> None:
    """Raise ValueError where a field of a dataclass is none of the ``choices`` in its metadata."""
    for field in fields(settings):
        value, choices = getattr(settings, field.name), field.metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"`{field.name}` must be one of {', '.join(map(str, choices))}, got {value!r}")
