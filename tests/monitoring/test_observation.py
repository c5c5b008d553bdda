from __future__ import annotations

import json

from routed_peft.monitoring.observation import ContributionLog


def test_contribution_log_resumes():
    ledger, again = ContributionLog(), ContributionLog()
    for step in (1, 2, 3):
        ledger.add(step, "forget", {"a": 0.1, "b": -0.2})
    ledger.forget_until(1)
    again.restore(json.loads(json.dumps(ledger.state())))
    assert again.since(2, ["forget"]) == {"a": 0.1, "b": -0.2} and again.total(["forget", "no"]) == ledger.total(
        ["forget"]
    )
    assert again.since(0, ["bio"]) == {} and again.state() == json.loads(json.dumps(ledger.state()))
