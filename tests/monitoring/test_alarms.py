from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routed_peft.monitoring.alarms import Alarms, Cusum, MonitorConfig

values = st.lists(st.floats(-100, 100), min_size=5, max_size=60)


@given(values, st.floats(0, 2), st.floats(1, 8))
@settings(deadline=None)
def test_cusum_is_the_largest_sum_of_any_last_values(series, slack, threshold):
    cusum = Cusum(4, slack, threshold)
    for x in series[:4]:
        cusum.update(x)
        assert cusum.level == 0
    assert cusum.mean == pytest.approx(sum(series[:4]) / 4, abs=1e-9)
    z = []
    for x in series[4:]:
        cusum.update(x)
        z.append(min((x - cusum.mean) / cusum.spread - slack, threshold))
        assert cusum.level == pytest.approx(max(0.0, *(sum(z[i:]) for i in range(len(z)))), rel=1e-6, abs=1e-6)
    assert cusum.spread >= torch.tensor(series[:4], dtype=torch.float64).std().item() * (1 - 1e-9)


@given(st.lists(st.floats(-3, 0.5), max_size=40), st.lists(st.floats(2.0, 50), min_size=8, max_size=20))
@settings(deadline=None)
def test_a_shift_is_found_soon_and_its_onset_exactly(quiet_values, shifted):
    """Values within the slack of the calibrated mean raise nothing; from the first beyond it on, each counts at least one."""
    alarms = Alarms(MonitorConfig(calibration=20, watch=["growth"], patience=1))
    before = [1.0, -1.0] * 10 + quiet_values  # mean 0, standard deviation 1.03
    for step, x in enumerate(before, 1):
        alarms.observe(step, {"forget/growth": x})
        assert alarms.status == "ok"
    for step, x in enumerate(shifted, len(before) + 1):
        alarms.observe(step, {"forget/growth": x})
        assert alarms.onset_step == len(before)
    assert alarms.status == "halt"
    assert alarms.series["forget/growth"].streak >= len(shifted) - 5


def test_one_outlier_is_no_alarm_and_a_broken_value_is():
    alarms = Alarms(MonitorConfig(calibration=4, watch=["growth"], patience=2))
    for step, x in enumerate([1.0, 2.0, 1.0, 2.0, 1e9, 1.5, 1.5], 1):
        alarms.observe(step, {"forget/growth": x})
        assert alarms.status == "ok"
    alarms.observe(8, {"forget/growth": float("nan")})
    assert alarms.status == "warn" and alarms.onset_step == 4
    state = alarms.state()
    again = Alarms(alarms.config)
    again.restore(state)
    assert again.state() == state and again.status == "warn"
