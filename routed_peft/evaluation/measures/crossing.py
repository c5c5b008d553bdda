"""`Crossing`: the place at which a curve reaches a value, by interpolation, or a bound on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Crossing:
    """The place at which a curve reaches a value: ``at``; with the ``relation`` ">" or "<" it lies beyond that bound.

    >>> str(Crossing(500, ">")), Crossing(500, ">").censored
    ('> 500', True)
    """

    at: float
    relation: Literal["=", ">", "<"] = "="

    @property
    def censored(self) -> bool:
        """Whether the value is not reached between the curve's ends, so that ``at`` is a bound."""
        return self.relation != "="

    def as_dict(self) -> dict[str, float | str | bool]:
        """Return plain data for JSON: ``at``, ``relation`` and ``censored``."""
        return {"at": self.at, "relation": self.relation, "censored": self.censored}

    def __str__(self) -> str:
        return ("" if self.relation == "=" else f"{self.relation} ") + f"{self.at:.4g}"


def crossing(places: Sequence[float], values: Sequence[float], *, target: float, log: bool = False) -> Crossing:
    r"""Return the place at which falling ``values`` first reach ``target``.

    .. math:: x = x_i + (x_{i+1} - x_i) \frac{y_i - t}{y_i - y_{i+1}}

    between the last value above the target and the first at or below it; with ``log`` in the logarithm of the places. It is in
    the unit of ``places``; the last of them with ">" if the target is never reached (right-censored), and the first with "<" if
    the first value is below it already.

    Raises:
        ValueError: on unequal lengths, places that do not ascend, or values that are not finite.

    >>> crossing([0, 10, 20], [5.0, 4.0, 2.0], target=3.0)
    Crossing(at=15.0, relation='=')
    >>> print(crossing([0, 10, 20], [5.0, 4.0, 2.0], target=1.0), crossing([1e6, 1e8], [5.0, 3.0], target=4.0, log=True))
    > 20 1e+07
    """
    if len(places) != len(values) or not len(places) or any(b <= a for a, b in zip(places, places[1:], strict=False)):
        raise ValueError(f"a crossing needs ascending `places` and a value for each, got {places} and {values}")
    if not all(map(math.isfinite, [*places, *values, target])):
        raise ValueError(f"a crossing needs finite numbers, got {values} and the target {target}")
    if values[0] <= target:
        return Crossing(places[0], "=" if values[0] == target else "<")
    for i in range(len(values) - 1):
        if values[i + 1] <= target:
            share = (values[i] - target) / (values[i] - values[i + 1])
            if log:
                return Crossing(places[i] * (places[i + 1] / places[i]) ** share)
            return Crossing(places[i] + (places[i + 1] - places[i]) * share)
    return Crossing(places[-1], ">")
