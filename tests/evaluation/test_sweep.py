from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import tiny
from relearning_parts import DATA, FORGET, RETAIN, model, state, tokenizer

from routed_peft.evaluation.relearning import (
    Attack,
    AttackData,
    Curve,
    Point,
    RelearnOptions,
    TextLoss,
    relearn,
    summarize,
)
from routed_peft.evaluation.relearning.attacked_model import AttackedModel
from routed_peft.training import RunDirectory
from routed_peft.unlearning.weight_noise import add_noise

TOKENIZER = tokenizer()
NAMES = (
    "forget mixed few-shot-1 few-shot-4 retain unrelated facts lora lora+mixed bias perturb perturb+lora+few-shot-2 int8 int4"
).split()


def attack(victim, name, rates=(1e-2,), seeds=(0,), steps=(0, 1, 3), extensions=0, data=DATA, **options):
    grid = {"learning_rates": rates, "seeds": seeds, "steps": steps}
    return relearn(
        victim, TOKENIZER, attack=name, data=data, **grid, options=RelearnOptions(extensions=extensions, **options)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_attack_runs_and_gives_the_model_back(name):
    victim = model(torch.bfloat16)
    victim.lm_head.weight.requires_grad_(False)
    before, modules = state(victim), [type(module) for module in victim.modules()]
    random_state = torch.get_rng_state()
    curves = attack(victim, name, seeds=(0, 1))
    after = victim.state_dict()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert [type(module) for module in victim.modules()] == modules and not hasattr(victim, "peft_config")
    assert not victim.lm_head.weight.requires_grad and victim.model.embed_tokens.weight.requires_grad
    assert all(parameter.grad is None for parameter in victim.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    trains = not name.startswith("int")
    assert [(curve.learning_rate, curve.seed) for curve in curves] == ([(1e-2, 0), (1e-2, 1)] if trains else [(0.0, 0)])
    assert [point.step for point in curves[0].points] == ([0, 1, 3] if trains else [0])
    if name in ("forget", "mixed", "lora", "bias", "few-shot-4", "facts"):
        assert {curve.status for curve in curves} == {"attack"}
    if trains:  # seeds differ in order, documents or adapters, once there is a choice
        assert curves[0].points[-1].tokens > curves[0].points[1].tokens > curves[0].points[0].tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("silent", ["lm_head.weight", ""])
def test_a_model_that_says_nothing_can_be_attacked(silent):
    """Its loss is that of the uniform distribution; with all weights at zero, no gradient arrives either."""
    for name in NAMES:
        victim = model()
        for key, parameter in victim.named_parameters():
            if key.endswith(silent):
                parameter.data.zero_()
        curves = attack(victim, name, extensions=1)
        assert curves[0].start["forget"] == pytest.approx(math.log(300))
        result = summarize(Attack.parse(name), curves)
        assert result["verdict"] in ("attack", "no attack") and math.isfinite(result["envelope"][-1]["mean"])


def test_full_fine_tuning_is_plain_adamw_on_all_documents():
    victim = model(torch.float64)
    curve = attack(victim, "forget", steps=(0, 1, 2, 5))[0]
    slow = model(torch.float64)
    optimizer = torch.optim.AdamW(slow.parameters(), lr=1e-2, weight_decay=0.0)
    expected = []
    rows = [[0, *TOKENIZER.encode(text), 1] for text in FORGET[:4]]
    for step in range(6):
        if step in (0, 1, 2, 5):
            expected.append(TextLoss(slow, TOKENIZER, FORGET[4:])(slow))
        optimizer.zero_grad()
        losses = [slow(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
        (sum(losses) / sum(len(row) - 1 for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)
        optimizer.step()
    assert curve.losses("forget") == pytest.approx(expected, abs=1e-7)  # Llama's norms compute in float32
    assert curve.points[-1].tokens == 5 * sum(len(row) - 1 for row in rows)


def test_low_precision_does_not_blunt_the_attack():
    """In bfloat16 a step of 1e-6 rounds to nothing."""
    rounded = model(torch.bfloat16)
    full = model(torch.bfloat16).float()
    curves = [attack(victim, "forget", rates=(1e-6,), steps=(0, 20))[0].losses("forget") for victim in (rounded, full)]
    assert curves[0] == curves[1] and curves[0][1] < curves[0][0]


@pytest.mark.slow
def test_the_grid_extends_itself_while_the_best_lies_at_its_edge():
    curves = attack(model(), "forget", rates=(1e-5, 2e-5), extensions=2)
    assert [curve.learning_rate for curve in curves] == [1e-5, 2e-5, 4e-5, 8e-5]
    wide = attack(model(), "forget", rates=(1e-4, 3e-2, 10.0), extensions=2)
    assert [curve.learning_rate for curve in wide] == [1e-4, 3e-2, 10.0], "the best is inside"
    high = attack(model(), "forget", rates=(1e30,), extensions=1)
    assert [curve.learning_rate for curve in high] == [3.333e29, 1e30], "too high to help at all"


def test_an_attack_that_diverges_or_helps_nobody_says_so():
    curves = attack(model(), "forget", rates=(1e-30, 50.0), steps=(0, 1, 5))
    assert [curve.status for curve in curves] == ["no attack", "diverged"]
    forgotten = Curve("retain", "forget", 1e-3, 0, {"forget": 5.0, "retain": 4.0},
                      tuple(Point(i, i, scores) for i, scores in enumerate([{"forget": 5.0, "retain": 4.0},
                                                                            {"forget": 6.2, "retain": 3.5}])))  # fmt: skip
    assert forgotten.status == "no attack", "other text was learned, which drives the target's out: no divergence"
    assert summarize(Attack.parse("retain"), [forgotten], reference=3.0)["recovery"] == {
        "steps": None,
        "tokens": None,
        "share": None,
    }
    point = {"forget": 5.0, "retain": 4.0}
    spiked = replace(
        forgotten, points=tuple(Point(i, i, {k: v + x for k, v in point.items()}) for i, x in enumerate([0, 9, 0.5]))
    )
    assert spiked.status == "diverged", "it was far off on the way, and helped nobody"
    useful = replace(spiked, points=(*spiked.points, Point(3, 3, {"forget": 4.0, "retain": 4.0})))
    assert useful.status == "attack"
    hardly = replace(forgotten, points=(Point(0, 0, point), Point(1, 1, {"forget": 4.99, "retain": 4.0})))
    assert hardly.status == "no attack", "a hundredth of a nat is none"
    lost = replace(forgotten, points=(*forgotten.points, Point(2, 2, {"forget": math.nan, "retain": math.nan})))
    assert summarize(Attack.parse("retain"), [lost], reference=3.0)["recovery"]["share"] is None, (
        "divergence is no robustness"
    )
    victim = model()
    broken = attack(victim, "forget", rates=(1e30,), steps=(0, 1, 5, 6))[0]
    assert broken.status == "diverged" and math.isnan(broken.losses("forget")[-1])
    assert [point.step for point in broken.points] == [0, 1, 5, 6] and broken.points[-1].tokens < 6 * 100
    assert all(tensor.isfinite().all() for tensor in victim.state_dict().values())


def test_the_bias_moves_logits_only():
    victim = tiny("gemma2", vocab_size=300)
    seen = []

    def measure(attacked):
        with torch.no_grad():
            seen.append(attacked(torch.tensor([[0, 5, 9], [0, 7, 7]])).logits)
        return {"forget": TextLoss(attacked, TOKENIZER, FORGET)(attacked)}

    curve = attack(victim, "bias", rates=(0.1,), steps=(0, 1, 4), measure=measure)[0]
    moved = seen[-1] - seen[1]
    assert curve.status == "attack" and float(moved.abs().max()) > 0.1
    assert torch.allclose(moved, moved[0, 0].expand_as(moved), atol=1e-5), "the same everywhere"


def test_facts_are_scored_on_the_half_that_is_not_trained_on():
    halves = [DATA.halves(seed) for seed in (0, 1)]
    for trained, scored in halves:
        assert len(trained) == len(scored) == 3 and set(trained) | set(scored) == set(DATA.facts)
    assert halves[0] != halves[1] and DATA.halves(0) == halves[0]
    victim = model()
    for seed, (_, scored) in enumerate(halves):
        curve = attack(victim, "facts", seeds=(seed,))[0]
        assert curve.target == "facts" and set(curve.start) == {"forget", "retain", "facts"}
        assert curve.start["facts"] == pytest.approx(TextLoss(victim, TOKENIZER, scored)(victim))


def test_perturbing_comes_before_the_first_step():
    victim = model()
    noisy = model()
    add_noise(noisy, 0.05, beta=1.0, seed=1)
    curve = attack(victim, "perturb", seeds=(1,))[0]
    expected = {name: TextLoss(noisy, TOKENIZER, texts)(noisy) for name, texts in DATA.scored(Attack("f"), 1).items()}
    found = {name: curve.points[0].scores[name] for name in expected}
    assert found == pytest.approx(expected) and curve.start != found


@pytest.mark.slow
def test_finished_curves_are_not_run_again_and_halves_are(tmp_path, monkeypatch):
    records = RunDirectory(tmp_path)
    first = attack(model(), "forget", rates=(1e-3, 1e-2), seeds=(0, 1), records=records, names={"arm": "routed"})
    assert len(records.points()) == 4 * 3
    lines = records.path.joinpath("metrics.jsonl").read_text().splitlines(keepends=True)
    records.path.joinpath("metrics.jsonl").write_text("".join(lines[:-2]) + lines[-2][:10])  # killed while it wrote
    ran = []
    whole = AttackedModel.prepared_for
    monkeypatch.setattr(AttackedModel, "prepared_for", lambda self, *what: ran.append(what) or whole(self, *what))
    again = attack(model(), "forget", rates=(1e-3, 1e-2), seeds=(0, 1), records=records, names={"arm": "routed"})
    assert again == first and len(ran) == 1 and ran[0][1] == 1
    assert len(records.points()) == 4 * 3 and {point["arm"] for point in records.points()} == {"routed"}
    attack(model(seed=1), "forget", rates=(1e-2,), records=records, names={"arm": "routed"})
    assert len(ran) == 2, "other weights, another curve"
    attack(model(), Attack("forget", batch_size=2), rates=(1e-2,), records=records, names={"arm": "routed"})
    assert len(ran) == 3, "other settings, another curve"


def test_curves_with_numbers_that_are_none_are_read_back(tmp_path):
    records = RunDirectory(tmp_path)
    first = attack(model(), "forget", rates=(1e30,), records=records)[0]
    again = attack(model(), "forget", rates=(1e30,), records=records)[0]
    assert first.status == again.status == "diverged" and math.isnan(again.losses("retain")[-1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retain", {"data": AttackData(FORGET[:4], FORGET[4:], RETAIN)}, "documents of `retain_train`, which has 0"),
        ("few-shot-9", {}, "trains on 9 documents of `forget_train`, which has 4"),
        ("facts", {"data": AttackData(FORGET[:4], FORGET[4:], RETAIN)}, "at least two `facts`"),
        ("few", {}, "`few` is no part of an attack"),
        ("full+lora", {}, "says `method` twice"),
        ("forget+retain", {}, "says `data` twice"),
        ("int4+int8", {}, "says `bits` twice"),
        ("few-shot-4+facts", {}, "trains on half of them"),
        ("forget", {"rates": ()}, "`learning_rates` must be different positive numbers"),
        ("forget", {"rates": (1e-3, 1e-3)}, "`learning_rates`"),
        ("forget", {"rates": (0.0, 1e-3)}, r"positive numbers, at least one, got \[0.0, 0.001\]"),
        ("lora", {"rates": (-1e-3,)}, "`learning_rates` must be different positive numbers"),
        ("forget", {"rates": (math.nan,)}, "`learning_rates` must be different positive numbers"),
        ("forget", {"seeds": ()}, "`seeds` must be"),
        ("forget", {"steps": (1, 2)}, "`steps` must ascend from 0"),
        ("forget", {"steps": (0, 2, 2)}, "`steps` must ascend from 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(name, options, message):
    victim = model()
    with pytest.raises(ValueError, match=message):
        attack(victim, name, **options)
