"""Packages whose public names are imported on first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], *, before: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package that imports its names when they are first used.

    A submodule that was not imported yet is found as an attribute too.

    Args:
        package: the package's ``__name__``.
        homes: module of each public name; a submodule is its own home.
        before: module imported ahead of the first name, for what it registers.
    """

    def __getattr__(name: str) -> Any:
        if name in homes:
            if before is not None:
                import_module(before)
            home = import_module(homes[name])
            value = home if homes[name] == f"{package}.{name}" else getattr(home, name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted(homes)

    return __getattr__, __dir__
