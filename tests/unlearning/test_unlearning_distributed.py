from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from places import PARTS
from unlearning_worker import METHODS, run

WORKER = PARTS / "unlearning_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert process.returncode == 0, process.stderr[-6000:]
    return [torch.load(out / f"results-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("case", [*METHODS, "undo", "undo from stored outputs"])
def test_two_processes_unlearn_like_one(ranks, one, case):
    for rank in ranks:
        assert rank[case]["ledger"] == one[case]["ledger"]
        assert rank[case].get("record") == one[case].get("record")
        for name, parameter in one[case]["parameters"].items():
            assert torch.allclose(rank[case]["parameters"][name], parameter, atol=1e-6), name
