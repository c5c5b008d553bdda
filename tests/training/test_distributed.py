from __future__ import annotations

from pathlib import Path

import pytest
from distributed_worker import FSDP_CASES, STEPS, TRAINER_CASES, fsdp_gradients, monitored_log, result_of, train
from two_processes import results_of_ranks

from routed_peft import load_routed


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The directory of two processes."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(two):
    return results_of_ranks("distributed_worker.py", two)


def assert_close(a, b, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        error = float((a[name] - b[name]).abs().max())
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", TRAINER_CASES)
def test_two_processes_train_like_one(ranks, tmp_path, case):
    """All forget rows are on rank 0, and in some steps a group rests that only one rank could have told about."""
    one = result_of(train(tmp_path, **{**TRAINER_CASES[case], "save_strategy": "no"}))
    for rank in ranks:
        assert_close(rank[case]["parameters"], one["parameters"], 1e-6)
        assert rank[case]["tokens_per_route"] == one["tokens_per_route"]
        assert rank[case]["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    assert all(one["tokens_per_route"].values())


def test_resumed_equals_uninterrupted_in_two_processes(ranks):
    for rank in ranks:
        assert_close(rank["resumed"]["parameters"], rank["saved"]["parameters"], 0.0)
        assert rank["resumed"]["tokens_per_route"] == rank["saved"]["tokens_per_route"]


def test_saved_once_and_loads(two, ranks):
    assert not (two / "saved by rank 1").exists()
    assert {p.name for p in (two / "saved").iterdir()} >= {f"checkpoint-{STEPS // 2}", f"checkpoint-{STEPS}"}
    for path in (two / "saved by rank 0", two / "saved" / f"checkpoint-{STEPS}"):
        loaded = dict(load_routed(path, regions=["forget"]).named_parameters())
        assert_close(ranks[0]["resumed"]["parameters"], loaded, 0.0)


def test_a_schedule_keeps_processes_together_and_the_base_as_it_is(ranks):
    """Each process draws rows of its own for the consistency pass, whose gradient is reduced with the batch's."""
    for case in (("scheduled", 0.0), ("scheduled", 2.0)):
        assert_close(ranks[0][case]["parameters"], ranks[1][case]["parameters"], 0.0)
    without, with_pass = (ranks[0]["scheduled", factor]["parameters"] for factor in (0.0, 2.0))
    base = {name for name in without if ".forget." not in name}
    assert_close({name: without[name] for name in base}, {name: with_pass[name] for name in base}, 0.0)
    assert any(not without[name].equal(with_pass[name]) for name in without.keys() - base)


def test_two_processes_are_monitored_like_one(ranks, tmp_path):
    one = monitored_log(tmp_path)
    assert ranks[0]["monitored"] == ranks[1]["monitored"] and len(one) == 4
    for line, expected in zip(ranks[0]["monitored"], one, strict=True):
        unknown = {"monitor/forget/captured"}  # no process sees the gradients of the others
        assert line.keys() == expected.keys() - unknown
        assert line == pytest.approx({name: expected[name] for name in line}, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("case", FSDP_CASES, ids=lambda case: "-".join(map(str, case)))
def test_fully_sharded_gradients_equal_those_of_one_process(ranks, case):
    one = fsdp_gradients(*case)
    scale = max(float(g.abs().max()) for g in one.values())
    for rank in ranks:  # Llama's norms compute in float32
        assert_close(rank[case], one, scale * (1e-6 if case[0] == "llama" else 1e-12))
