"""`RegionSchedule`: its draws, and the consistency pass against one example at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from reference import loss_of
from torch.nn import functional as F
from training_parts import assert_same, model_of, rows, train, trainer_of, weights

from routed_peft import GradientRouting, RoutedConfig, presets
from routed_peft.adapters import adapter_names
from routed_peft.routes import IGNORED
from routed_peft.training import RegionSchedule
from routed_peft.training.consistency import divergence
from routed_peft.training.region_schedule import ConsistencyRows

TWO = ["bio", "cyber"]
LABELS = ["bio", "retain", "cyber"]


def two_regions(dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.nn.Module:
    part = {"size": 3, "r": 2, "embeddings": "full", "init": "model", "task_type": "CAUSAL_LM"}
    return model_of(adapters={name: RoutedConfig(**part) for name in TWO}, **overrides).to(dtype)


def names(schedule: RegionSchedule, labels: torch.Tensor) -> list[str]:
    known = list(schedule.routes())
    return [known[i] if i >= 0 else "" for i in labels.tolist()]


def test_draws_have_the_shares_asked_for_and_repeat():
    schedule = RegionSchedule(TWO, robust=0.25, spread=0.5, seed=3)
    known = list(schedule.routes())
    given = torch.tensor([known.index(name) for name in ("retain", "bio", "unlabeled", "cyber")] * 2000)
    drawn = schedule.draw(given, step=7, steps=100)
    assert torch.equal(drawn, schedule.draw(given, step=7, steps=100))
    for other in ({"step": 8}, {"step": 7, "moment": (1, 0)}):
        assert not torch.equal(drawn, schedule.draw(given, **{"steps": 100, **other}))
    count = Counter(names(schedule, drawn))
    for label, share in {"bio/robust": 0.125, "retain": 0.75, "bio/spread": 0.5, "cyber": 0.5, "unlabeled": 1}.items():
        assert abs(count[label] / 2000 - share) < 0.05, label


def test_without_shares_the_labels_stay():
    schedule = RegionSchedule(TWO)
    given = torch.arange(len(schedule.routes()))
    assert torch.equal(schedule.draw(given, step=0, steps=10), given)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert RegionSchedule(TWO, robust=1.0).draw(tokens, step=0, steps=10) is tokens


def test_in_the_branch_at_the_end_the_base_rests():
    schedule = RegionSchedule(TWO, spread=1.0, branch=0.2)
    known = list(schedule.routes())
    given = torch.tensor([known.index(name) for name in ("retain", "bio", "unlabeled")])
    assert names(schedule, schedule.draw(given, step=7, steps=10)) == ["retain", "bio/spread", "unlabeled"]
    core, own, unlabeled = schedule.draw(given, step=8, steps=10).tolist()
    assert known[core].endswith("/branch") and known[own] == "bio" and unlabeled == IGNORED
    assert all(schedule.routes()[known[label]].weight("base") == 0 for label in (core, own))


def test_consistency_switches_on_at_least_one_region_of_another_topic():
    schedule = RegionSchedule([*TWO, "chem"], consistency_rows=4)
    known = list(schedule.routes())
    given = torch.tensor([known.index(name) for name in ("retain", "bio", "unlabeled", "chem", "bio/spread")])
    seen = set()
    for step in range(200):
        drawn = schedule.draw_consistency(given, step=step)
        assert sorted(drawn.rows.tolist()) == [0, 1, 3]
        assert bool((drawn.on & ~drawn.own).any(1).all())
        seen |= {(int(row), *on) for row, on in zip(drawn.rows, drawn.on.tolist(), strict=True)}
    assert len([case for case in seen if case[0] == 0]) == 7 and len([case for case in seen if case[0] == 1]) == 6
    assert RegionSchedule(["bio"]).draw_consistency(torch.tensor([1, 1]), step=0) is None  # topics of one region
    assert RegionSchedule(["bio"], consistency=0).draw_consistency(torch.tensor([0]), step=0) is None


def test_the_pass_equals_one_example_at_a_time(tmp_path, tokenizer):
    model = two_regions(torch.float64)
    schedule = RegionSchedule(TWO, consistency=2.0)
    trainer = trainer_of(tmp_path, tokenizer, model, routes=schedule, dataset=rows(labels=LABELS))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 2
    trainer.model_wrapped = model
    ids = torch.randint(3, 250, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 4:] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    on = torch.tensor([[True, True], [True, True], [False, True]])
    own = torch.tensor([[False, False], [True, False], [True, False]])
    trainer._consistency_pass(model, batch, ConsistencyRows(torch.tensor([2, 0, 1]), on, own))
    got = {name: p.grad for name, p in model.named_parameters()}
    assert not any(g is not None and g.any() for n, g in got.items() if ".bio." not in n and ".cyber." not in n)
    trainer.routing.detach()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    reached = (labels[:, 1:] != IGNORED).sum()
    for row, present, topic in zip([2, 0, 1], on, own, strict=True):
        one = ids[row : row + 1]
        active = [name for name, here in zip(TWO, present & topic, strict=True) if here]
        model.base_model.set_adapter(active) if active else model.base_model.disable_adapter_layers()
        target = model(input_ids=one).logits.detach()
        model.base_model.enable_adapter_layers()
        learners = [name for name, here in zip(TWO, present & ~topic, strict=True) if here]
        model.base_model.set_adapter([name for name, here in zip(TWO, present, strict=True) if here])
        for p in model.parameters():
            p.requires_grad_(True)
        model.zero_grad()
        logits = model(input_ids=one).logits
        p, q = target.softmax(-1)[:, :-1], logits.log_softmax(-1)[:, :-1]
        each = (p * (p.log() - q)).sum(-1) * (labels[row : row + 1, 1:] != IGNORED)
        (2.0 * each.sum() / reached / 2).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and any(f".{learner}." in name for learner in learners):
                expected[name] += parameter.grad
    for name in (name for name in expected if ".bio." in name or ".cyber." in name):
        given = got[name] if got[name] is not None else torch.zeros_like(expected[name])
        assert torch.allclose(given, expected[name], atol=1e-6), name  # the divergence is computed in float32
    assert any(expected[name].abs().max() > 1e-4 for name in expected if ".bio." in name)


def test_consistency_leaves_the_base_as_it_is_and_changes_regions(tmp_path, tokenizer):
    runs = {}
    for factor in (0.0, 3.0):
        schedule = RegionSchedule(TWO, consistency=factor, consistency_every=1)
        trainer = train(tmp_path, tokenizer, two_regions(), routes=schedule, dataset=rows(labels=LABELS))
        runs[factor] = weights(trainer.model)
        logged = [entry["consistency"] for entry in trainer.state.log_history if "consistency" in entry]
        assert bool(logged) == bool(factor) and all(value > 0 for value in logged)
        assert bool(trainer.consistency_tokens) == bool(factor)
    regions = [name for name in runs[0.0] if ".bio." in name or ".cyber." in name]
    assert_same(*({n: w for n, w in run.items() if n not in regions} for run in runs.values()))
    assert any(not torch.equal(runs[0.0][name], runs[3.0][name]) for name in regions)


def test_resumed_equals_uninterrupted(tmp_path, tokenizer):
    schedule = RegionSchedule(TWO, robust=0.3, spread=0.3, branch=0.2, consistency_every=3)
    options = {"routes": schedule, "dataset": rows(labels=LABELS), "gradient_accumulation_steps": 2}
    whole = train(tmp_path / "a", tokenizer, two_regions(), **options)
    train(tmp_path / "b", tokenizer, two_regions(), save_strategy="steps", save_steps=3, **options)
    resumed = train(
        tmp_path / "b", tokenizer, two_regions(), resume=str(tmp_path / "b" / "checkpoint-3"), save_strategy="steps",
        save_steps=3, **options,
    )  # fmt: skip
    assert_same(weights(whole.model), weights(resumed.model))


def test_regions_learn_at_their_own_rate(tmp_path, tokenizer):
    trainer = train(
        tmp_path, tokenizer, two_regions(), routes=RegionSchedule(TWO, rate=3.0), dataset=rows(labels=LABELS)
    )
    rates = {group["route"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"base": 1e-2, "bio": pytest.approx(3e-2), "cyber": pytest.approx(3e-2)}
    named = train(tmp_path, tokenizer, two_regions(), routes=RegionSchedule(TWO), dataset=rows(labels=LABELS),
                  region_learning_rate=5e-3)  # fmt: skip
    assert {group["initial_lr"] for group in named.optimizer.param_groups if group["route"] != "base"} == {5e-3}


@pytest.mark.parametrize("options", [{"joint": ["norms"]}, {"edges": "activations"}])
def test_a_pass_that_would_teach_the_base_is_refused(options, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="a consistency pass must teach regions alone"):
        trainer_of(
            tmp_path, tokenizer, two_regions(), routes=RegionSchedule(TWO), dataset=rows(labels=LABELS), **options
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regions": []}, "`regions` is a list of different names"),
        ({"regions": "bio"}, "`regions` is a list of different names, got 'bio'"),
        ({"regions": ["bio", "bio"]}, "different names"),
        ({"regions": ["base"]}, "a region cannot be called 'base'"),
        ({"core": "bio"}, "`core` is the label of rows outside all regions"),
        ({"robust": 1.5}, "`robust`"),
        ({"consistency": float("nan")}, "`consistency`"),
        ({"consistency_every": 0}, "`consistency_every`"),
        ({"rate": 0.0}, "`rate`"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RegionSchedule(**{"regions": ["bio"], **settings})


def test_subsets_of_regions_by_example():
    model = two_regions(torch.float64)
    routing = GradientRouting(model, presets.gram(TWO), train_base=True)
    ids = torch.randint(3, 250, (2, 5), generator=torch.Generator().manual_seed(1))
    present = {"bio": torch.tensor([True, False]), "cyber": torch.tensor([True, True])}
    with routing.subset(present, {"cyber": torch.tensor([0.0, 1.0])}):
        loss_of(model, {"input_ids": ids, "labels": ids}).backward()
    taught = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert taught and all(".cyber." in name for name in taught)
    for message, arguments in {
        r"has \['chem'\]; the regions are": ({"chem": torch.ones(2).bool()},),
        r"`weights` has \['chem'\]": (present, {"chem": torch.ones(2)}),
    }.items():
        with pytest.raises(ValueError, match=message), routing.subset(*arguments):
            pass
    with pytest.raises(ValueError, match="cannot be used within"), routing(["core"] * 2), routing.subset(present):
        pass
    assert adapter_names(model) == TWO


def test_divergence_is_the_mean_over_tokens_that_are_predicted():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    reached = torch.tensor([[True, False], [True, True]])
    kl = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="none").sum(-1)[:, :-1]
    assert torch.allclose(divergence(a, b, reached), (kl[0, 0] + kl[1, 0] + kl[1, 1]) / 3)
    assert divergence(a, b, torch.zeros(2, 2).bool()) == 0
