from __future__ import annotations

import numpy as np
import pytest
import torch
from trl_parts import (
    completions_of,
    is_hack,
    logps,
    prompts,
    trainer_of,
    two_loras,
)

from routed_peft import ablated
from routed_peft.trl.sampling import anchor_groups

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


def test_anchor_groups_are_drawn_from_trusted_environments_at_their_share():
    environments = ["A", "B"] * 8
    draws = [anchor_groups(environments, 0.2, trusted=["A"], seed=[0, step]) for step in range(200)]
    assert np.mean([d.mean() for d in draws]) == pytest.approx(0.2, abs=0.01)
    assert not any(d[1::2].any() for d in draws)
    assert anchor_groups(["B"] * 4, 0.5, trusted=["A"], seed=[0]).sum() == 0


@pytest.mark.slow
def test_anchors_are_sampled_and_scored_without_the_region(tmp_path):
    trainer = trainer_of(
        tmp_path, dataset=prompts(12, ["A", "B"]), label_fn=lambda rows, **_: ["unflagged"] * len(rows), anchor_share=0.4,
        anchor_environments=["A"], generation_kwargs={"top_k": 1}, max_steps=1, per_device_train_batch_size=16,
        num_iterations=2,
    )  # fmt: skip
    trainer.train()
    (batch,) = trainer.seen
    labels = batch["route_label"].tolist()
    assert labels.count(2) in (4, 8)  # whole groups, the fraction of one by lot
    model = two_loras().eval()
    for row in range(16):
        regions = ("forget",) if labels[row] == 2 else ()
        old = batch["old_per_token_logps"][row][batch["completion_mask"][row].bool()]
        torch.testing.assert_close(old, logps(model, batch, row, *regions).detach(), rtol=0, atol=1e-5)
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()][None]
        with ablated(model, "forget", scale=0.0 if regions else 1.0):
            greedy = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
        completion = completions_of(batch)[row]
        assert greedy[: len(completion)].tolist() == completion
    history = trainer.state.log_history[0]
    assert history["clip_ratio/high_max"] == history["clip_ratio/low_min"] == 0
    assert history["routing/anchor_share"] == labels.count(2) / 16
    assert history["routing/environment/A/reward"] >= 0


def test_flagged_anchors_keep_their_label_and_train_the_region_off_policy(tmp_path):
    trainer = trainer_of(tmp_path, anchor_share=0.99, max_steps=1, per_device_train_batch_size=16)
    trainer.train()
    (batch,) = trainer.seen
    hacks = [is_hack(ids) for ids in completions_of(batch)]
    assert batch["route_label"].tolist()[:4] != [2] * 4 and any(hacks)
    assert all(label == 0 for label, hack in zip(batch["route_label"].tolist(), hacks, strict=True) if hack)
    assert "old_per_token_logps" in batch
