from __future__ import annotations

import json
import warnings

import pytest
import torch
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def step_time(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    import step_time

    yield step_time
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_step_time_runs_and_reports(step_time, tmp_path, capsys):
    out = tmp_path / "results" / "step_time.json"
    step_time.main(["--sizes", "tiny", "--repeats", "1", "--no-compile", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    timed = report["sizes"]["tiny"]["time"]
    assert {(row["kind"], row["zero"]) for row in timed} == {
        (kind, share) for kind in ("rows", "tokens", "sgtm rows") for share in (0.0, 0.1, 0.5, 0.9)
    }
    assert all(row["ratio"] > 0 for row in [*timed, *report["today"].values(), *report["regions"]])
    assert all(0.9 < row["ratio"] < 1.2 for row in report["sizes"]["tiny"]["memory"])
    assert {"processor", "cores", "device"} <= report["hardware"].keys() and report["threads"] == 1
    assert "Training step" in capsys.readouterr().out


@pytest.mark.slow
def test_grpo_step_runs_and_reports(step_time, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    import grpo_step

    out = tmp_path / "results" / "grpo_step.json"
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TRL calls transformers by old names
        grpo_step.main(["--sizes", "tiny", "--repeats", "1", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert {row["kind"] for row in report["targets"]} == set(grpo_step.LIMITS)
    assert all(0.2 < row["value"] < 5 for row in report["targets"])
    assert "GRPO step" in capsys.readouterr().out


@pytest.mark.slow
def test_monitor_step_runs_and_reports(step_time, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "1")
    import monitor_step

    out = tmp_path / "results" / "monitor_step.json"
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        monitor_step.main(["--sizes", "tiny", "--repeats", "1", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert {row["kind"] for row in report["targets"]} == set(monitor_step.KINDS)
    for row in report["targets"]:
        ratio = report["sizes"]["tiny"][row["kind"]]["ratio"]
        assert 0.2 < ratio < 20 and row["value"] == pytest.approx(1 + (ratio - 1) / report["every"])
    assert "observed" in capsys.readouterr().out


def test_labels_have_the_share_of_zero_weights(step_time):
    import steps

    for share in step_time.SHARES:
        assert int((steps.row_labels(share) == steps.FORGET).sum()) == round(share * steps.ROWS)
        assert int((steps.token_labels(share, 8) == steps.FORGET).sum()) == round(share * steps.ROWS * 8)


def test_todays_exact_steps_have_the_routed_gradients(step_time):
    """Two matmuls, and one label per micro-batch, block the same linear gradients as routing does."""
    import steps

    size, labels = steps.SIZES["tiny"], steps.row_labels(0.5)
    grads = {}
    for name in ("routed", "two matmuls, exact", "one label per micro-batch", "two passes"):
        all_steps = {
            **step_time.routed_steps(size, "cpu", {"routed": labels}),
            **steps.todays_steps(size, "cpu", labels),
        }
        step = all_steps[name]
        (optimizer,) = (a for a in step.args if isinstance(a, torch.optim.Optimizer))
        optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
        step()
        (model,) = (a for a in step.args if isinstance(a, torch.nn.Module))
        linears = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
        grads[name] = {n: p.grad for n, p in model.named_parameters() if id(p) in linears}
    for name, found in grads.items():
        for parameter, g in grads["routed"].items():
            assert torch.allclose(found[parameter], g, atol=1e-6), (name, parameter)
