"""`SelfLabeler` in two processes, which share the scoring and must come to the same labels as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from self_labels_worker import CASES, run
from two_processes import results_of_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """The results of either of two processes."""
    return results_of_ranks("self_labels_worker.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_labels_of_one(ranks, tmp_path, case):
    one = run(tmp_path, case)
    assert one["scorings"] and one["logged"] and len(set(one["labels"])) > 1
    assert one["ledger"]["flops"] > 0
    for rank in ranks:
        for name in ("labels", "scorings", "sides", "tokens_per_route", "logged", "ledger"):
            assert rank[case][name] == one[name], name
        for name, parameter in one["parameters"].items():
            assert torch.allclose(rank[case]["parameters"][name], parameter, rtol=0, atol=1e-4), name


def test_a_resumed_run_of_two_processes_equals_the_uninterrupted_one(ranks):
    for rank in ranks:
        whole, resumed = rank["one short"], rank["resumed"]
        for name in ("labels", "scorings", "sides", "tokens_per_route"):
            assert resumed[name] == whole[name], name
        for name, parameter in whole["parameters"].items():
            assert torch.equal(resumed["parameters"][name], parameter), name
