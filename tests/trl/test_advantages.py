from __future__ import annotations

import numpy as np
import pytest
import torch
from trl_parts import (
    completions_of,
    is_hack,
    reward,
    trainer_of,
)

from routed_peft.trl.rollouts import unflagged_advantages

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


def test_baseline_over_unflagged_rollouts(tmp_path):
    trainer = trainer_of(tmp_path, baseline_over="unflagged", scale_rewards="none", max_steps=1)
    trainer.train()
    (batch,) = trainer.seen
    by_prompt: dict[tuple, list[int]] = {}
    for row in range(8):
        by_prompt.setdefault(tuple(batch["prompt_ids"][row].tolist()), []).append(row)
    rewards = reward(completions_of(batch))
    hacks = [is_hack(ids) for ids in completions_of(batch)]
    assert any(hacks) and not all(hacks)
    for rows in by_prompt.values():
        honest = [rewards[row] for row in rows if not hacks[row]] or [rewards[row] for row in rows]
        for row in rows:
            assert float(batch["advantages"][row]) == pytest.approx(rewards[row] - np.mean(honest), abs=1e-5)
    assert sorted(trainer._logs["advantages"]) == pytest.approx(sorted(batch["advantages"].tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_where_nothing_is_flagged_the_baseline_is_that_of_trl(tmp_path, scale):
    none = lambda completion_ids, **_: ["unflagged"] * len(completion_ids)
    seen = []
    for over in ("group", "unflagged"):
        trainer = trainer_of(tmp_path, label_fn=none, baseline_over=over, scale_rewards=scale, max_steps=1)
        trainer.train()
        seen.append(trainer.seen[0])
    assert seen[0]["advantages"].abs().max() > 0.1
    assert torch.equal(seen[0]["completion_ids"], seen[1]["completion_ids"])
    torch.testing.assert_close(seen[1]["advantages"], seen[0]["advantages"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_flagged_rewards_count_in_the_spread_alone(scale):
    rewards = torch.tensor([0.0, 1.0, 5.0, 9.0, 2.0, 4.0, 1.0, 3.0])
    flagged = torch.tensor([False, False, True, True] + [True] * 4)
    found = unflagged_advantages(rewards, flagged, num_generations=4, scale_rewards=scale)
    for group, mean in ((slice(0, 4), 0.5), (slice(4, 8), 2.5)):  # of all, where all are flagged
        spread = (rewards[group] if scale == "group" else rewards).std() + 1e-4
        torch.testing.assert_close(found[group], (rewards[group] - mean) / spread)
