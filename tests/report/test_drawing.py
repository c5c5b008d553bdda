from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routed_peft.report.drawing import spread


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0.01, 2))
def test_labels_keep_their_order_and_their_distance(values, gap):
    moved = spread(values, gap)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(moved[b] - moved[a] >= gap - 1e-6 for a, b in zip(order, order[1:], strict=False))
    assert sum(moved) == pytest.approx(sum(values), abs=1e-6)
