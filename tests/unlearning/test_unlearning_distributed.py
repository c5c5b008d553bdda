from __future__ import annotations

from typing import Any

import pytest
import torch
from two_processes import results_of_ranks
from unlearning_worker import METHODS, run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return results_of_ranks("unlearning_worker.py", tmp_path_factory.mktemp("two"))


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
