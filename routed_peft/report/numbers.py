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


def write(value: float, as_share: bool, digits: int | None) -> str:
    """Write a number, or a share as a percentage."""
    return share(value, digits or 0) if as_share else number(value, 2 if digits is None else digits)


def ends(value: Spread, as_share: bool = False, digits: int | None = None) -> str:
    """Write the lowest and the highest seed; nothing where they do not differ.

    >>> ends(Spread(0.6, 0.5, 0.7, 2), as_share=True), ends(Spread(0.0, -0.5, 0.5, 2)), ends(Spread(0.5, 0.5, 0.501, 2))
    ('50–70', '−0.50 to 0.50', '')
    """
    low, high = (write(end, as_share, digits).removesuffix(" %") for end in (value.min, value.max))
    return "" if low == high else low + (" to " if low.startswith("−") else "–") + high
