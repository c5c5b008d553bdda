from __future__ import annotations

import json
import math

import pytest

from routed_peft.evaluation.relearning import (
    Attack,
    Curve,
    Point,
    summarize,
)
from routed_peft.evaluation.relearning.summary import summary_tables


def test_a_seed_that_diverged_keeps_the_retain_loss_of_the_state_it_goes_back_to():
    start = {"forget": 5.0, "retain": 3.0}

    def curve(seed, *pairs):
        points = (Point(i, i, {"forget": f, "retain": r}) for i, (f, r) in enumerate(pairs))
        return Curve("forget", "forget", 0.1, seed, start, tuple(points))

    nan = math.nan
    curves = [curve(0, (5.0, 3.0), (4.0, 3.5), (nan, nan)), curve(1, (5.0, 3.0), (4.5, 3.1), (2.0, 3.3))]
    result = summarize(Attack("forget"), curves, reference=1.0)
    last = result["envelope"][-1]
    assert (last["mean"], last["retain"]) == (pytest.approx(3.0), pytest.approx((3.5 + 3.3) / 2))
    assert all(one.keys() == last.keys() for one in result["useful"]["envelope"]), "the same is said of useful states"
    summary = {"source": "a model", "attacks": {"forget": json.loads(json.dumps(result))}}
    assert [table.row_count for table in summary_tables(summary)] == [1, 1]
    summary["attacks"]["forget"]["envelope"][-1]["retain"] = None  # as files of earlier versions have it
    assert [table.row_count for table in summary_tables(summary)] == [1, 1]
