"""Pages that need nothing else: templates, and pictures within the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routed_peft.report.drawing import DARK, LIGHT, Draw, render
from routed_peft.report.numbers import ends, number, place, share

try:
    import jinja2
except ImportError as error:
    raise ImportError('pages are made with jinja2: pip install "routed_peft[report]"') from error

TEMPLATES = Path(__file__).parents[1] / "templates"


def environment(*folders: Path) -> jinja2.Environment:
    """Return the templates, with filters for numbers; a name that a template uses and does not get is an error.

    ``folders`` hold templates of one's own, which may extend and import those of this library.
    """
    loader = jinja2.FileSystemLoader([*folders, TEMPLATES])
    style: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    result = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **style)
    result.filters |= {"number": number, "percent": share, "place": place, "ends": ends}
    return result


def picture(draws: Sequence[Draw], caption: str, size: tuple[float, float] = (5.6, 3.7)) -> dict[str, str]:
    """Return ``light`` and ``dark``, panels as the address of an SVG that holds itself, and their ``caption``."""
    return {"caption": caption} | {
        mode: inline(render(draws, theme, size=size)) for mode, theme in (("light", LIGHT), ("dark", DARK))
    }


def inline(svg: bytes) -> str:
    """Return an SVG as a ``data:`` address that holds all of it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
