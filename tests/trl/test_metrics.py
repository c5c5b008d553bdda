from __future__ import annotations

import math

import pytest
import torch

from routed_peft.trl.rollouts import rollout_metrics

LABELS = ["flagged", "odd", "unflagged", "anchor"]
REWARDS = torch.tensor([2.0, 1.0, math.nan, 0.5])
ABOUT = {
    "anchor": torch.tensor([False, False, False, True]),
    "tokens": {"flagged": 3, "odd": 0, "unflagged": 4, "anchor": 5},
    "flagged": ["flagged", "odd"],
}


def test_shares_rewards_and_tokens_by_label_and_environment():
    found = rollout_metrics(LABELS, REWARDS, environments=["A", "A", "B", None], **ABOUT)
    assert found["routing/flag_rate"] == 0.5 and found["routing/anchor_share"] == 0.25
    for label in LABELS:
        assert found[f"routing/share/{label}"] == 0.25 and found[f"routing/tokens/{label}"] == ABOUT["tokens"][label]
    assert [found[f"routing/reward/{label}"] for label in ("flagged", "odd", "anchor")] == [2.0, 1.0, 0.5]
    assert math.isnan(found["routing/reward/unflagged"]), "none had a reward"
    assert found["routing/environment/A/flag_rate"] == 1 and found["routing/environment/B/flag_rate"] == 0
    assert found["routing/environment/A/reward"] == 1.5 and "routing/environment/None/reward" not in found
    assert len(found) == 2 + 3 * 4 + 2 * 2


def test_rewards_that_are_missing_do_not_count():
    found = rollout_metrics(["a"] * 3, torch.tensor([1.0, math.nan, 3.0]), anchor=torch.zeros(3, dtype=torch.bool),
                            tokens={}, flagged=[], environments=[1, 1, "1"])  # fmt: skip
    assert found["routing/reward/a"] == found["routing/environment/1/reward"] == pytest.approx(2.0)
    assert found["routing/flag_rate"] == 0 and found["routing/share/a"] == 1
