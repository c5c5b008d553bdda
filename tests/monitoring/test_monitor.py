"""Monitored runs: who is ranked first, halting, rolling back, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from families import tiny
from monitor_parts import model_of, monitored, quiet, rows, trainer_of
from peft import LoraConfig, get_peft_model
from places import ROOT
from subspace_parts import subspace_file, with_subspace

from routed_peft.monitoring import (
    Incident,
    MonitorConfig,
    RegionMonitor,
    apply_quarantine,
    run_with_rollback,
)
from routed_peft.monitoring.quarantine import checkpoints, past_incidents
from routed_peft.training import SubspaceProjection

PHASES = dict(
    learning_rate=3e-3, weight_decay=0.0, max_steps=44, train_sampling_strategy="sequential", save_strategy="steps",
    save_steps=2,
)  # fmt: skip


def two_phases(seed: int = 0) -> Dataset:
    """24 steps of random rows, then half of the rows repeat a pattern that can be learned."""
    return concatenate_datasets([rows(192, seed, ("noise",)), rows(320, seed + 1)])


def watchful(**fields) -> MonitorConfig:
    return quiet(**{"every": 2, "watch": ["raw_contribution"], "calibration": 10, "slack": 1.0, **fields})


def make(out: Path, quarantine: dict[str, str] | None = None, **fields):
    data = apply_quarantine(two_phases(2 * len(quarantine or {})), quarantine or {})
    trainer = trainer_of(out, dataset=data, **PHASES)
    RegionMonitor(trainer, watchful(**fields), environments=["noise", "pattern"])
    return trainer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logged(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "monitor/status" in line]


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """A run that halts because one environment feeds the region."""
    out = tmp_path_factory.mktemp("halted")
    trainer = make(out)
    trainer.train()
    return trainer, out


@pytest.mark.slow
def test_the_guilty_environment_is_ranked_first(halted):
    trainer, out = halted
    incident = Incident.read(out)
    assert trainer.state.global_step == incident.step < 44
    assert incident.named == ["pattern"] and incident.environments[0]["name"] == "pattern"
    first, second = incident.environments
    assert first["since_onset"] > 5 * abs(second["since_onset"])
    assert 20 <= incident.onset_step < incident.step
    assert list(incident.alarms) == ["forget/raw_contribution"]
    assert {row["environment"] for row in incident.samples} == {"pattern"}
    assert incident.samples[0]["input_ids"] == [40, 80, 120, 160] * 2 and isinstance(incident.samples[0]["text"], str)


def test_alarms_are_looked_into_at_every_step_and_saved(halted):
    trainer, out = halted
    lines = logged(trainer)
    status = {line["step"]: line["monitor/status"] for line in lines}
    warned = min(step for step, code in status.items() if code)
    incident = Incident.read(out)
    assert list(status) == [*range(2, warned + 1, 2), *range(warned + 1, incident.step + 1)]
    assert incident.step == warned + 2 and status[incident.step] == 2  # patience
    assert {warned, incident.step} <= set(checkpoints(out))


def test_a_halted_run_does_not_go_on_by_accident(halted):
    trainer, out = halted
    with pytest.raises(ValueError, match="the run was halted"):
        trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{trainer.state.global_step}"))


@pytest.mark.slow
def test_rollback_resumes_and_finishes_clean(tmp_path):
    seen = []

    def make_trainer(quarantine):
        seen.append(quarantine)
        return make(tmp_path, quarantine)

    trainer, incidents = run_with_rollback(make_trainer, tmp_path)
    assert seen == [{}, {"pattern": "drop"}] and [incident.named for incident in incidents] == [["pattern"]]
    assert trainer.state.global_step == 44 and not (tmp_path / "incident.json").exists()
    onset = incidents[0].onset_step
    steps = [line["step"] for line in logged(trainer)]
    assert steps == list(range(2, 45, 2))  # one history: what came after the onset is not in it
    after = [line for line in logged(trainer) if line["step"] > onset]
    assert all(line["monitor/status"] == 0 and line["monitor/forget/contribution/pattern"] == 0 for line in after)
    moved = sorted(path.name for path in (tmp_path / "incidents" / "1").iterdir())
    assert "incident.json" in moved and f"checkpoint-{incidents[0].step}" in moved
    assert trainer.args.ignore_data_skip
    again, _ = run_with_rollback(make_trainer, tmp_path)  # a finished run is finished
    assert again.state.global_step == 44 and seen[-1] == {"pattern": "drop"}


@pytest.mark.slow
def test_exempt_environments_raise_no_alarm_and_are_not_named(tmp_path):
    trainer = make(tmp_path / "one", exempt=["pattern"])
    trainer.train()
    assert all(line["monitor/status"] == 0 for line in logged(trainer)) and trainer.state.global_step == 44
    assert any(line["monitor/forget/raw_contribution/pattern"] > 0 for line in logged(trainer))  # measured all the same
    other = make(tmp_path / "other", exempt=["pattern"], max_functional_size=1e-9, patience=1)
    other.train()
    incident = Incident.read(tmp_path / "other")
    assert incident.named == ["noise"] and {row["name"] for row in incident.environments} == {"noise", "pattern"}
    with pytest.raises(ValueError, match=r"`exempt` has \['Noise'\], and the environments are \['noise', 'pattern'\]"):
        make(tmp_path / "third", exempt=["Noise"])


def test_growth_is_watched_without_what_exempt_environments_contribute(halted):
    report = next(iter(halted[0].observer.reports.values()))
    parts = report.contributions
    assert report.alarm_metrics()["growth"] == report.growth.growth
    assert report.alarm_metrics(["pattern"])["growth"] == pytest.approx(parts["noise"] + report.growth.rest, abs=1e-6)
    assert set(report.alarm_metrics(["noise", "pattern"])) == {"growth"}


@pytest.mark.slow
def test_a_run_that_keeps_halting_stops(tmp_path):
    make_trainer = lambda quarantine: make(tmp_path, max_functional_size=1e-9, patience=1)  # which drops nothing
    with pytest.raises(RuntimeError, match=r"at step 2, after 1 incidents \(`max_incidents` = 1\)"):
        run_with_rollback(make_trainer, tmp_path, max_incidents=1)
    assert (tmp_path / "incident.json").exists() and past_incidents(tmp_path)[0].onset_step == 0
    with pytest.raises(RuntimeError, match="no environment is to blame"):
        run_with_rollback(make_trainer, tmp_path, decide=lambda incident: {})
    with pytest.raises(ValueError, match="gave a trainer with `output_dir`"):
        run_with_rollback(make_trainer, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "status"), [(12, "ok"), (30, "ok"), (32, "warn")])
def test_resumed_equals_uninterrupted(halted, tmp_path, cut, status):
    """While calibrating, on the way to an alarm, and in it: the monitor's state, its log and the incident, to the last bit."""
    whole, out = halted
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{cut}"))
    assert resumed.observer.state() == whole.observer.state()
    assert logged(resumed) == logged(whole)
    a, b = Incident.read(out), Incident.read(tmp_path)
    assert (a.step, a.onset_step, a.alarms, a.environments, a.named) == (
        b.step,
        b.onset_step,
        b.alarms,
        b.environments,
        b.named,
    )
    saved = json.loads((out / f"checkpoint-{cut}" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["RegionMonitor"]["attributes"]["status"] == status


@pytest.mark.slow
def test_training_is_what_it_is_without_a_monitor(tmp_path):
    """With dropout, and a reward that draws random numbers."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3, init_lora_weights=False)
    runs = []
    for watched in (True, False):
        model = get_peft_model(model_of().unload(), lora, adapter_name="forget")
        trainer = trainer_of(tmp_path, model=model, max_steps=4)
        if watched:
            RegionMonitor(trainer, quiet(reward_every=2), reward=lambda model, name: float(torch.rand(())))
        torch.manual_seed(3)
        trainer.train()
        runs.append(weights(trainer.model))
    assert all(torch.equal(a, runs[1][name]) for name, a in runs[0].items())


@pytest.mark.slow
def test_reward_gap(tmp_path):
    calls = []

    def reward(model, environment):
        assert not torch.is_grad_enabled() and not model.training
        calls.append(environment)
        ids = torch.tensor([[40, 80, 120, 160] * 2])
        surprise = torch.rand(()).item()  # the same with the region and without
        return surprise - float(model(input_ids=ids, labels=ids).loss) * (environment == "pattern")

    config = quiet(reward_every=4, max_reward_gap=0.05, action="warn", patience=1)
    trainer, monitor = monitored(tmp_path, config, max_steps=8)
    monitor.reward = reward
    trainer.train()
    gaps = {line["step"]: line for line in logged(trainer) if "monitor/forget/reward_gap/noise" in line}
    high = [step for step, line in gaps.items() if line["monitor/forget/reward_gap/pattern"] > 0.05]
    assert all(line["monitor/forget/reward_gap/noise"] == 0 for line in gaps.values())
    assert list(gaps) == sorted({4, 8, *range(high[0], 9)})  # every fourth step, and every one from the alarm on
    assert len(calls) == 4 * len(gaps) and monitor.status == "halt"
    assert trainer.state.global_step == 8 and not (tmp_path / "incident.json").exists()  # action="warn"
    assert list(checkpoints(tmp_path)) == [high[0]]


@pytest.mark.slow
@pytest.mark.parametrize("projected", [True, False])
def test_a_base_that_moves_along_the_subspace_halts_the_run(tmp_path, projected):
    model = with_subspace(tiny("llama", vocab_size=300), subspace_file(tmp_path), "forget", start=True)
    config = quiet(max_weight_drift=MonitorConfig().max_weight_drift, patience=2)
    trainer, monitor = monitored(tmp_path, config, model=model, train_base=True)
    if not projected:
        trainer.remove_callback(SubspaceProjection)
    trainer.train()
    assert all("monitor/forget/weight_drift" in line for line in logged(trainer))
    if projected:
        assert monitor.status == "ok" and trainer.state.global_step == 6
    else:
        assert list(Incident.read(tmp_path).alarms) == ["forget/weight_drift"] and trainer.state.global_step < 6


def test_logging_alone_saves_and_halts_nothing(tmp_path):
    trainer, monitor = monitored(tmp_path, quiet(max_kl=1e-9, action="log", every=2, by_layer=True))
    trainer.train()
    assert monitor.status == "halt" and trainer.state.global_step == 6 and not list(tmp_path.glob("checkpoint-*"))
    assert [line["step"] for line in logged(trainer)] == [2, 4, 6]
    line = logged(trainer)[-1]
    layer = "monitor/forget/model.layers.1.mlp.up_proj"
    total = sum(v for k, v in line.items() if k.endswith("/contribution/noise") and "layers" in k)
    assert total == pytest.approx(line["monitor/forget/contribution/noise"], rel=1e-5)
    assert {f"{layer}/size", f"{layer}/functional_size/pattern"} <= line.keys()


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 4}]
)
def test_other_ways_to_train(tmp_path, options):
    model = model_of()
    model.enable_input_require_grads()
    trainer, monitor = monitored(tmp_path, model=model, max_steps=2, max_grad_norm=0.01, **options)
    trainer.train()
    report = monitor.reports["forget"]
    assert report.growth.captured > 0.999 and report.effect.kl.isfinite().all()


def test_several_regions(tmp_path):
    model = model_of("mlp")
    model.add_adapter("bio", model.peft_config["forget"].__class__(size=2, init="model", task_type="CAUSAL_LM"))
    trainer, monitor = monitored(tmp_path, model=model, max_steps=2)
    trainer.train()
    assert list(monitor.reports) == ["forget", "bio"] and "monitor/bio/growth" in logged(trainer)[0]


def test_a_gradient_that_escapes_is_noticed(tmp_path):
    trainer, _ = monitored(tmp_path)
    inner = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        penalty = sum(p.square().sum() for name, p in model.named_parameters() if "lora_A" in name)
        return inner(model, inputs, *args, **kwargs) + penalty

    trainer.compute_loss = compute_loss
    with pytest.raises(ValueError, match="are not those that train the region 'forget'"):
        trainer.train()


def test_evaluation_needs_no_environments(tmp_path):
    trainer, monitor = monitored(tmp_path, max_steps=2, evaluate_ablated=True)
    trainer.evaluate(rows(4))
    trainer.train()
    trainer.evaluate(rows(4))
    assert {"eval_loss", "eval_ablated_loss"} <= trainer.state.log_history[-1].keys() | trainer.state.log_history[
        -2
    ].keys()


@pytest.mark.slow
def test_the_example_in_the_documentation(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {"__name__": "example"})
    assert "['hackable'] since step" in capsys.readouterr().out
    assert json.loads((tmp_path / "run-monitored" / "quarantine.json").read_text()) == {"hackable": "drop"}


@pytest.mark.slow
def test_the_monitor_follows_the_model_of_every_run(tmp_path):
    """`model_init` makes a new one at the beginning of each."""
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    expected = monitored(tmp_path / "once", **options)
    expected[0].train()
    made = [model_of()]
    trainer, monitor = monitored(tmp_path / "often", model=made[0], **options)
    trainer.model_init = lambda trial=None: made.append(model_of()) or made[-1]
    for runs in (2, 3):
        trainer.train()
        assert len(made) == runs and trainer.model is made[-1]
        watched = {p for layers in monitor.factors.values() for f in layers for m in f.modules for p in m.parameters()}
        assert watched and watched <= set(made[-1].parameters())
        assert monitor.reports["forget"].flatten(True) == expected[1].reports["forget"].flatten(True)
        assert monitor.reports["forget"].growth.growth != 0
