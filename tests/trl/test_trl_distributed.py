"""Two gloo processes: labels, anchors and baselines of groups of which each process has a half."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from places import PARTS
from trl_parts import assert_same, is_hack, reward
from two_processes import in_two_processes

from routed_peft import load_routed


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    in_two_processes(PARTS / "trl_worker.py", out)
    return out


def test_groups_that_span_processes_have_one_baseline_and_one_configuration(two):
    ranks = [torch.load(two / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    anchors = 0
    for steps in zip(*(rank["steps"] for rank in ranks), strict=True):
        assert len({tuple(prompt) for step in steps for prompt in step["prompts"]}) == 1  # one group, half of it each
        completions = [ids for step in steps for ids in step["completions"]]
        hacks = [is_hack(ids) for ids in completions]
        labels = torch.cat([step["labels"] for step in steps]).tolist()
        honest = {label for label, hack in zip(labels, hacks, strict=True) if not hack}
        assert len(honest) == 1 and all(label == 0 for label, hack in zip(labels, hacks, strict=True) if hack)
        anchors += honest == {2}
        rewards = torch.tensor(reward(completions))
        baseline = rewards[~torch.tensor(hacks)].mean()
        torch.testing.assert_close(torch.cat([step["advantages"] for step in steps]), rewards - baseline)
    assert 0 < anchors < 4
    assert_same(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["tokens"] == ranks[1]["tokens"] and all(ranks[0]["tokens"].values())
    assert sum(ranks[0]["tokens"].values()) == sum(
        len(ids) for rank in ranks for step in rank["steps"] for ids in step["completions"]
    )
    loaded = load_routed(two / "run" / "checkpoint-4", regions=["forget"])
    saved = {name: p.detach() for name, p in loaded.named_parameters() if "lora" in name}
    assert_same(ranks[0]["weights"], saved)


def test_a_process_without_anything_to_train_on_does_not_take_the_processes_apart(two):
    """The self-check reduces gradients over all processes: all of them make it, or none."""
    assert_same(*(torch.load(two / f"truncated-{rank}.pt", weights_only=True) for rank in (0, 1)))
