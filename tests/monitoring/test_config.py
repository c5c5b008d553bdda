from __future__ import annotations

import pytest
from monitor_parts import monitored

from routed_peft.monitoring import (
    Alarms,
    MonitorConfig,
)


def test_bad_configurations(tmp_path):
    for fields, message in (
        ({"every": 0}, "`every` must be at least 1"),
        ({"calibration": 1}, "`calibration` must be at least 2"),
        ({"blame": 0.0}, "`blame` is a share"),
        ({"watch": ["size"]}, r"`watch` has \['size'\]"),
        ({"action": "stop"}, "`action` must be one of"),
        ({"threshold": 0.0}, "`threshold` positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MonitorConfig(**fields)
    with pytest.raises(ValueError, match="`restore_callback_states_from_checkpoint`"):
        monitored(tmp_path, restore_callback_states_from_checkpoint=True)
    trainer, _ = monitored(tmp_path)
    trainer.observer = None
    with pytest.raises(ValueError, match="saw no batch of this step"):
        trainer.train()


def test_limits_leave_room_for_a_region_that_merely_drifts():
    alarms = Alarms(MonitorConfig())
    for step in range(5):
        alarms.observe(step, {"forget/kl": 0.61, "forget/functional_size": 0.38})
    assert alarms.status == "ok"
    for step in range(5, 8):
        alarms.observe(step, {"forget/kl": 1.1, "forget/functional_size": 0.38})
    assert alarms.status == "halt" and alarms.onset_step == 4
