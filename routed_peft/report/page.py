"""What pages share: templates, numbers as readers want them, pictures within the page, files written aside and renamed."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2

from routed_peft.evaluation.measures import Crossing
from routed_peft.report.drawing import DARK, LIGHT, Draw, render

TEMPLATES = Path(__file__).parents[1] / "templates"


def environment() -> jinja2.Environment:
    """Return the templates, with the filters ``number``, ``percent``, ``place`` and ``part``; what they name must be there."""
    result = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    result.filters |= {"number": number, "percent": share, "place": place, "part": part}
    return result


def number(value: float | None, digits: int = 2) -> str:
    """Write a number, or a dash where there is none.

    >>> number(3.14159), number(-0.5, 1), number(None)
    ('3.14', '−0.5', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:z.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """Write a difference, with its sign.

    >>> signed(0.125), signed(-0.5), signed(-0.001)
    ('+0.12', '−0.50', '+0.00')
    """
    return f"{value:+z.2f}".replace("-", "−")


def share(value: float | None, digits: int = 0) -> str:
    """Write a share as a percentage; None, in JSON, is NaN.

    >>> share(0.756), share(0.7561, 1), share(-0.1), share(None)
    ('76 %', '75.6 %', '−10 %', 'not measurable')
    """
    if value is None or math.isnan(value):
        return "not measurable"
    return f"{100 * value:z.{digits}f} %".replace("-", "−")


def place(where: Crossing | None) -> str:
    """Write where a curve reaches a value, or the bound beyond which it may.

    >>> place(Crossing(72.463)), place(Crossing(80, ">")), place(Crossing(-0.25)), place(None)
    ('72.5', '> 80', '−0.25', '–')
    """
    if where is None:
        return "–"
    return ("" if where.relation == "=" else f"{where.relation} ") + f"{where.at:.3g}".replace("-", "−")


def part(where: Crossing | None) -> str:
    """Write a share that was read off a curve as a percentage, or its bound.

    >>> part(Crossing(0.156)), part(Crossing(0.8, "<")), part(Crossing(-1e-16)), part(None)
    ('16 %', '< 80 %', '0 %', '–')
    """
    return "–" if where is None else ("" if where.relation == "=" else f"{where.relation} ") + share(where.at)


def picture(draws: Sequence[Draw], caption: str, size: tuple[float, float] = (5.6, 3.7)) -> dict[str, str]:
    """Return ``light`` and ``dark``, panels as the address of an SVG that holds itself, and their ``caption``."""
    return {"caption": caption} | {
        mode: inline(render(draws, theme, size=size)) for mode, theme in (("light", LIGHT), ("dark", DARK))
    }


def inline(svg: bytes) -> str:
    """Return an SVG as an address that holds all of it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
