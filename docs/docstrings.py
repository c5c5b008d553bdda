"""Docstrings as Markdown, for the pages of the API: doctests become examples, and equations MathML."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

EQUATION = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>.*)\n(?P<rest>(?:(?:(?P=indent) +.*)?\n)*(?:(?P=indent) +.*)?)", re.MULTILINE
)
SYMBOL = re.compile(r":math:`([^`]+)`")
DOCTEST = re.compile(r"(?:^>>>.*\n(?:\S.*\n)*\n?)+", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed, and shows a field made by `option` with its default alone."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Replace a field's call of `option` by its default."""
        if isinstance(attr.value, griffe.ExprCall) and attr.value.canonical_path == "routed_peft.mistakes.option":
            attr.value = attr.value.arguments[0]

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """Return a docstring with doctests under ``Examples:``, where griffe looks for them, and equations as MathML.

    >>> to_markdown("Twice.\\n\\n>>> 1 + 1\\n2").splitlines()[2:]
    ['Examples:', '    >>> 1 + 1', '    2']
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = DOCTEST.sub(lambda found: "Examples:\n" + textwrap.indent(found[0], "    "), text + "\n")
    text = EQUATION.sub(equation, text)
    return SYMBOL.sub(lambda found: convert(found[1]), text).rstrip("\n")


def equation(found: re.Match[str]) -> str:
    """Return a displayed equation."""
    source = f"{found['first']} {found['rest']}"
    return f"{found['indent']}{convert(' '.join(source.split()), display='block')}\n\n"
