from __future__ import annotations

import pytest

from routed_peft.monitoring import (
    Incident,
    rollback,
)
from routed_peft.monitoring.quarantine import checkpoints, past_incidents


def test_rollback_moves_what_came_later(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()  # not whole
    Incident(6, 4, named=["b"]).write(tmp_path)
    assert rollback(tmp_path) == (tmp_path / "checkpoint-4", {"b": "drop"})
    assert sorted(p.name for p in tmp_path.glob("incidents/1/*")) == ["checkpoint-6", "incident.json"]
    with pytest.raises(ValueError, match="was not halted"):
        rollback(tmp_path)
    assert rollback(tmp_path, Incident(4, 1, named=["a"]), {"a": "route"}) == (None, {"b": "drop", "a": "route"})
    assert [incident.step for incident in past_incidents(tmp_path)] == [6, 4] and not checkpoints(tmp_path)
    with pytest.raises(ValueError, match="unknown treatment 'remove'"):
        rollback(tmp_path, Incident(4, 1), {"a": "remove"})
    (tmp_path / "incident.json").write_text('{"step": 1, "hm": 2}')
    with pytest.raises(ValueError, match="is no incident"):
        Incident.read(tmp_path)
