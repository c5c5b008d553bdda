from __future__ import annotations

import runpy
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from routed_peft.report.drawing import spread


@pytest.mark.parametrize(("library", "file"), [("matplotlib", "drawing"), ("jinja2", "page")])
def test_without_the_extra_the_message_names_it(monkeypatch, library, file):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'{library}: pip install "routed_peft\[report\]"$'):
        runpy.run_path(str(ROOT / "routed_peft" / "report" / f"{file}.py"))


@pytest.mark.slow
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0.01, 2))
def test_labels_keep_their_order_and_their_distance(values, gap):
    moved = spread(values, gap)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert all(moved[b] - moved[a] >= gap - 1e-6 for a, b in zip(order, order[1:], strict=False))
    assert sum(moved) == pytest.approx(sum(values), abs=1e-6)
