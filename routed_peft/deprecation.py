"""Names that were changed and still work, with a warning."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of the module of this name, which answers to old ``names`` with what bears the new ones."""

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return lookup


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that ``old`` is called ``new`` now; by default in the name of the caller's caller."""
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=stacklevel + 1)


def formerly_positional(*names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let keyword-only arguments, ``names`` in their former order after two others, be given by position, with a warning."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Result:
            late = args[2:]
            if late and len(late) <= len(names) and not kwargs.keys() & set(names[: len(late)]):
                given = ", ".join(f"{name}=" for name in names[: len(late)])
                message = f"{function.__name__} takes its third and later arguments by name now: write {given}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                args, kwargs = args[:2], {**dict(zip(names, late, strict=False)), **kwargs}
            return function(*args, **kwargs)

        return call

    return decorate
