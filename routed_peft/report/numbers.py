"""Numbers written for readers: a typographic minus, shares as percentages, a dash where nothing was measured."""

from __future__ import annotations

import math

from routed_peft.evaluation.measures import Crossing, Spread


def number(value: float | None, digits: int = 2) -> str:
    """Write a number, or a dash where there is none.

    >>> number(3.14159), number(-0.5, 1), number(None)
    ('3.14', '−0.5', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:z.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """Write a difference with its sign.

    >>> signed(0.125), signed(-0.5), signed(-0.001)
    ('+0.12', '−0.50', '+0.00')
    """
    return f"{value:+z.2f}".replace("-", "−")


def share(value: float | None, digits: int = 0) -> str:
    """Write a share as a percentage; None is the NaN of JSON.

    >>> share(0.756), share(0.7561, 1), share(-0.1), share(None)
    ('76 %', '75.6 %', '−10 %', 'not measurable')
    """
    if value is None or math.isnan(value):
        return "not measurable"
    return f"{100 * value:z.{digits}f} %".replace("-", "−")


def place(where: Crossing | None) -> str:
    """Write the place at which a curve reaches a value, or the bound beyond which it may.

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


def ranged(value: Spread | None, as_share: bool = False, digits: int | None = None) -> str:
    """Write a mean with its range over seeds.

    >>> ranged(Spread(0.6, 0.5, 0.7, 2), as_share=True), ranged(Spread(-0.5, -0.5, -0.5, 1)), ranged(None)
    ('60 % (50–70)', '−0.50', '–')
    """
    if value is None:
        return "–"
    between = ends(value, as_share, digits)
    return _written(value.mean, as_share, digits) + (f" ({between})" if between else "")


def ends(value: Spread, as_share: bool = False, digits: int | None = None) -> str:
    """Write the lowest and the highest seed; nothing where they do not differ.

    >>> ends(Spread(0.6, 0.5, 0.7, 2), as_share=True), ends(Spread(0.0, -0.5, 0.5, 2)), ends(Spread(0.5, 0.5, 0.501, 2))
    ('50–70', '−0.50 to 0.50', '')
    """
    low, high = (_written(end, as_share, digits).removesuffix(" %") for end in (value.min, value.max))
    return "" if low == high else low + (" to " if low.startswith("−") else "–") + high


def _written(value: float, as_share: bool, digits: int | None) -> str:
    return share(value, digits or 0) if as_share else number(value, 2 if digits is None else digits)
