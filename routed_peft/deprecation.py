"""Names that were changed and still work, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that answers to old names with what bears the new ones.

    Args:
        module: ``__name__`` of the module.
        names: old name -> new name.

    Example:
        >>> lookup = renamed("math", {"root": "sqrt"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     lookup("root") is sys.modules["math"].sqrt
        True
    """

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name], stacklevel=3)
        return getattr(sys.modules[module], names[name])

    return lookup


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn that ``old`` is called ``new`` now; by default in the name of the caller's caller."""
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=stacklevel + 1)
