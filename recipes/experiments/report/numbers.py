"""Numbers of experiments written for readers, beside those of `routed_peft.report.numbers`."""

from __future__ import annotations

from routed_peft.evaluation.measures import Crossing, Spread
from routed_peft.report.numbers import ends, share, write


def signed(value: float) -> str:
    """Write a difference with its sign.

    >>> signed(0.125), signed(-0.5), signed(-0.001)
    ('+0.12', '−0.50', '+0.00')
    """
    return f"{value:+z.2f}".replace("-", "−")


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
    return write(value.mean, as_share, digits) + (f" ({between})" if between else "")
