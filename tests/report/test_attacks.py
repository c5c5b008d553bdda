from __future__ import annotations

import json
import math

import pytest
from report_parts import attacked_checkpoint

from routed_peft.evaluation.measures import Spread
from routed_peft.report.attacks import from_summary, nan_if_none, spread


def summed_up(tmp_path, **changes):
    result = json.loads(attacked_checkpoint(tmp_path, "rmu").read_text())["attacks"]["forget"]
    return from_summary(result | changes)


def test_an_attack_of_a_summary(tmp_path):
    attack = summed_up(tmp_path)
    assert attack.steps == (0, 1, 3) and attack.forget[-1] == Spread(2.5, 2.5, 2.5, 2)
    assert attack.share_relearned.mean == pytest.approx((5.0 - 2.5) / (5.0 - 3.0))
    assert attack.attacked and attack.best_rates == (1e-3,)
    assert summed_up(tmp_path, verdict="attack in 1 of 2 seeds, diverged in 1").attacked
    assert not summed_up(tmp_path, verdict="diverged").attacked


def test_an_attack_without_a_reference_tells_no_share(tmp_path):
    attack = summed_up(tmp_path, recovery=None, reference=None)
    assert attack.share_relearned is None and attack.recovery is None and attack.reference is None


def test_numbers_that_json_lacks_are_left_out():
    assert math.isnan(nan_if_none(None)) and nan_if_none(1.0) == 1.0
    assert spread([1.0, math.nan, 3.0]) == Spread(2.0, 1.0, 3.0, 2) and spread([math.nan]) is None
