"""Mistakes of users: bounds on settings, and errors told in one line."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import field, fields
from typing import Any

EXTRAS = {"lm_eval": "eval", "pandas": "report", "sklearn": "classifiers", "trl": "trl"}
"""The extra of this package that installs each optional module."""
_OURS = (TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, NameError)


def explain(error: BaseException) -> str:
    """Return an error as one line that every terminal can show.

    An error that speaks of code rather than of its input is marked as unexpected.
    """
    words = " ".join([*getattr(error, "__notes__", []), str(error)]).split()  # such as: no directory
    text = " ".join(words).encode("utf-8", "backslashreplace").decode() or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").split(".")[0])):
        return f'{text} (pip install "routed_peft[{extra}]")'
    return f"unexpected {type(error).__name__}: {text} (`--debug` shows where)" if isinstance(error, _OURS) else text


def end_bars() -> None:
    """Close progress bars that an error left open, so that the next line has a line of its own."""
    if bars := sys.modules.get("tqdm"):
        for bar in list(getattr(bars.tqdm, "_instances", ())):
            bar.close()


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Turn what a library trips over in damaged files of ``source`` into a ValueError.

    >>> with reading("run"):
    ...     {}["model_type"]
    Traceback (most recent call last):
    ...
    ValueError: 'run' cannot be loaded (KeyError: 'model_type'): ...
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(
            f"{str(source)!r} brings code of its own, which runs only with `trust_remote_code` (`--trust-remote-code`): read "
            "it, and add that if you trust it"
        ) from error
    except _OURS as error:
        raise ValueError(f"{str(source)!r} cannot be loaded ({type(error).__name__}: {error}): a file of it is "
                         "damaged, or of another kind; restore it from a copy") from error  # fmt: skip


def check_numbers(settings: Any, *names: str, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ValueError where a field of ``settings`` is no number from ``low`` to ``high``; None passes."""
    for name in names:
        value = getattr(settings, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high and math.isfinite(value)):
            expected = ("" if math.isinf(low) else f" from {low:g}") + ("" if math.isinf(high) else f" to {high:g}")
            raise ValueError(f"`{name}` must be a number{expected}, got {value!r}")


def option(default: Any, help: str, *, choices: Collection[Any] | None = None) -> Any:
    """Return a dataclass field of `transformers.HfArgumentParser`: its default, of which a list is copied, help, choices."""
    metadata = {"help": help} | ({} if choices is None else {"choices": choices})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(settings: Any) -> None:
    """Raise ValueError where a field of a dataclass is none of the ``choices`` in its metadata."""
    for own in fields(settings):
        value, choices = getattr(settings, own.name), own.metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"`{own.name}` must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_shape(data: Any, shape: Any, place: str) -> None:
    """Raise ValueError, beginning with the ``place`` of JSON data, where it has another shape than expected.

    A shape is a type or union of types; ``[shape]`` for a list; ``{str: shape}`` for a mapping; or a dictionary of keys, of
    which those that end in "?" may be missing or null.

    >>> check_shape({"files": ["a", 3]}, {"files": [str], "routes?": {str: dict}}, "run.json")
    Traceback (most recent call last):
    ...
    ValueError: run.json: files[1] must be str, got 3
    """
    kind: Any = type(shape) if isinstance(shape, list | dict) else shape
    if not isinstance(data, kind) or (isinstance(data, bool) and kind in (int, float, int | float)):
        names = getattr(kind, "__name__", str(kind))
        separator = "" if ": " in place else ": the content"
        raise ValueError(f"{place}{separator} must be {names}, got {data!r:.80}")
    start = place if ": " in place else f"{place}: "
    if isinstance(shape, list):
        for index, item in enumerate(data):
            check_shape(item, shape[0], f"{start}[{index}]")
    elif isinstance(shape, dict) and str in shape:
        for key, item in data.items():
            check_shape(item, shape[str], f"{start}[{key!r}]")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            key = name.removesuffix("?")
            if key == name and key not in data:
                raise ValueError(f"{place} lacks {key!r}")
            if data.get(key) is not None or key == name:
                dot = "" if start.endswith(": ") else "."
                check_shape(data.get(key), inner, f"{start}{dot}{key}")
