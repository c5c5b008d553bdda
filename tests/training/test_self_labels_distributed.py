"""`SelfLabeler` in two processes, which share the scoring and must come to the same labels as one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from places import PARTS
from self_labels_worker import CASES, run

WORKER = PARTS / "self_labels_worker.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """The results of either of two processes."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert process.returncode == 0, process.stderr[-6000:]
    return [torch.load(out / f"results-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_labels_of_one(ranks, tmp_path, case):
    one = run(tmp_path, case)
    assert one["scorings"] and {"forget", "retain"} <= set(one["labels"])
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
