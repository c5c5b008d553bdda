from __future__ import annotations

import pytest

from experiments.report.numbers import part, ranged, signed
from routed_peft.evaluation.measures import Crossing, Spread
from routed_peft.report.numbers import ends, number, place, share


@pytest.mark.parametrize("write", [number, share, place, part, ranged])
def test_nothing_measured_is_written_as_such(write):
    assert write(None) in ("–", "not measurable")


def test_a_minus_is_typographic_and_zero_has_none():
    assert number(-0.001) == "0.00" and number(-1.0) == "−1.00" and signed(-0.001) == "+0.00"
    assert share(-0.5) == "−50 %" and place(Crossing(-2.0)) == "−2"


def test_a_range_is_told_where_seeds_differ():
    assert ranged(Spread(1.0, 1.0, 1.0, 3)) == "1.00" and ends(Spread(1.0, 1.0, 1.001, 3)) == ""
    assert ranged(Spread(0.0, -1.0, 1.0, 2)) == "0.00 (−1.00 to 1.00)"
    assert ranged(Spread(0.5, 0.25, 0.75, 2), as_share=True, digits=1) == "50.0 % (25.0–75.0)"
