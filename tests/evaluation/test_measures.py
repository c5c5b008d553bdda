from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from evaluation_parts import TEXTS, byte_tokenizer, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from regions_parts import randomize, with_region
from torch.nn import functional as F

from routed_peft.ablation import ablated
from routed_peft.evaluation.measures import (
    Crossing,
    Spread,
    absorption,
    bootstrap,
    compute_penalty,
    crossing,
    leakage,
    recovered,
    region_activity,
    relearning_area,
    removed,
    retain_tax,
    share_relearned,
    tax,
    to_recover,
    tokens_of_plain,
    way,
    within_utility,
    worst_case,
)
from routed_peft.evaluation.text_loss import TextLoss

STEPS = [0, 1, 5, 20]
losses = st.one_of(st.floats(0, 10), st.just(math.nan))
grids = st.dictionaries(
    st.sampled_from([1e-4, 1e-3, 1e-2]),
    st.lists(st.tuples(st.just(5.0), losses, losses, losses), min_size=2, max_size=2),
    min_size=1,
)


def kept(curve, index):
    """What an attacker has at a step: the loss there, or where the numbers are left the best one before."""
    return min(filter(math.isfinite, curve[:index])) if math.isnan(curve[index]) else curve[index]


@given(grids)
def test_the_envelope_is_the_least_mean_so_far(grid):
    for index, entry in enumerate(worst_case(STEPS, grid)):
        means = [
            statistics.fmean(kept(curve, i) for curve in curves) for curves in grid.values() for i in range(index + 1)
        ]
        assert entry.step == STEPS[index] and entry.mean == min(means)
        reached = [kept(curve, STEPS.index(entry.at)) for curve in grid[entry.learning_rate]]
        assert entry.at <= entry.step and (entry.min, entry.max) == (min(reached), max(reached))
        assert statistics.fmean(reached) == entry.mean


def test_an_attacker_who_wants_a_useful_model_is_held_back():
    forget = {1e-3: [[5.0, 4.5, 4.4, 4.3]], 1e-1: [[5.0, 2.0, 1.0, 0.5]]}
    retain = {1e-3: [[3.0, 3.0, 3.1, 3.2]], 1e-1: [[3.0, 3.1, 6.0, 9.0]]}
    free = [entry.mean for entry in worst_case(STEPS, forget)]
    held = [entry.mean for entry in worst_case(STEPS, forget, within_utility(retain, before=3.0))]
    assert (free, held) == ([5.0, 2.0, 1.0, 0.5], [5.0, 2.0, 2.0, 2.0])
    seeds = {1e-3: [[3.0, 3.0, 3.0, 2.9], [3.0, 3.2, 3.4, 3.4]]}  # 3.1, 3.2 and 3.15 on average
    allowed = within_utility(seeds, before=3.0)[1e-3]
    assert (
        [not math.isnan(value) for value in allowed[0]]
        == [True, True, False, True]
        == [not math.isnan(value) for value in allowed[1]]
    )


def test_a_seed_that_diverges_does_not_undo_what_others_reach_at_its_rate():
    curves = {1e-4: [[5.0, 4.9, 4.9, 4.9]] * 3, 1e-3: [[5.0, 3.0, 3.0, 2.0]] * 2 + [[5.0, 4.0, math.nan, math.nan]]}
    envelope = worst_case(STEPS, curves)
    assert [entry.mean for entry in envelope] == pytest.approx([5.0, 10 / 3, 10 / 3, 8 / 3])
    assert (envelope[-1].min, envelope[-1].max, envelope[-1].learning_rate) == (2.0, 4.0, 1e-3)


def test_an_envelope_needs_whole_curves():
    with pytest.raises(ValueError, match="no finite loss by step 0"):
        worst_case(STEPS, {1e-3: [[math.nan] * 4]})
    with pytest.raises(ValueError, match="a loss at each of the steps"):
        worst_case(STEPS, {1e-3: [[5.0, 4.0]]})


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-5, 5), st.booleans())
def test_a_crossing_lies_on_the_curve_or_is_censored(values, target, log):
    places = [2.0**i for i in range(len(values))]
    found = crossing(places, values, target=target, log=log)
    if found.relation == ">":
        assert found.at == places[-1] and min(values) > target
    elif found.relation == "<":
        assert found.at == places[0] and values[0] < target
    else:
        scale = np.log if log else np.asarray
        assert np.interp(scale(found.at), scale(places), values) == pytest.approx(target, abs=1e-6)
        before = [value for place, value in zip(places, values, strict=True) if place < found.at]
        assert all(value > target for value in before)
    assert found.censored == (found.relation != "=")


def test_recovery_is_reached_within_the_tolerance_or_censored_never_dropped():
    assert to_recover(STEPS, [5.0, 4.0, 3.0, 2.0], reference=2.98) == Crossing(5)
    assert to_recover(STEPS, [5.0, 4.0, 3.0, 2.0], reference=2.48) == Crossing(12.5)
    assert to_recover(STEPS, [5.0, 4.0, 3.0, 2.0], reference=1.9) == Crossing(20, ">")
    assert to_recover(STEPS, [1.0, 1.0, 1.0, 1.0], reference=2.0) == Crossing(0), "it never forgot"
    assert Crossing(20, ">").as_dict()["censored"] is True
    with pytest.raises(ValueError, match="finite"):
        to_recover(STEPS, [5.0, math.nan, 3.0, 2.0], reference=1.9)
    with pytest.raises(ValueError, match="ascending"):
        to_recover([0, 0], [5.0, 4.0], reference=1.9)


@given(st.floats(0, 1))
def test_the_area_runs_from_the_base_to_the_oracle(share):
    base, oracle = 3.0, [6.0, 5.5, 4.5, 4.0]
    own = [base + share * (o - base) for o in oracle]
    assert relearning_area(STEPS, own, base=base, oracle=oracle) == pytest.approx(share, abs=1e-9)
    assert relearning_area(STEPS, [3.0] * 4, base=3.0, oracle=oracle) == pytest.approx(0, abs=1e-9)
    assert math.isnan(relearning_area(STEPS, own, base=7.0, oracle=oracle))


def test_early_steps_weigh_as_much_as_late_ones_in_the_area():
    steps = [0, 1, 3, 7]  # ln 1, ln 2, ln 4, ln 8: equally spaced
    assert relearning_area(steps, [1.0, 1.0, 0.0, 0.0], base=0.0, oracle=[1.0] * 4) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="ascend from 0"):
        relearning_area([1, 3], [1.0, 1.0], base=0.0, oracle=[1.0, 1.0])


def test_filtering_leaks_one_and_plain_training_has_no_penalty():
    tokens, curve = [1e4, 1e5, 1e6], [6.0, 5.0, 3.0]
    for n, loss in zip(tokens, curve, strict=True):
        assert leakage(loss, unlabeled=n, tokens=tokens, losses=curve).at == pytest.approx(1)
        assert compute_penalty(loss, trained=n, tokens=tokens, losses=curve).at == pytest.approx(0)
    assert tokens_of_plain(4.0, tokens, curve).at == pytest.approx(10**5.5)
    assert leakage(6.5, 1e6, tokens=tokens, losses=curve) == Crossing(0.01, "<")
    assert leakage(2.0, 1e6, tokens=tokens, losses=curve) == Crossing(1.0, ">")
    assert compute_penalty(2.0, 2e6, tokens=tokens, losses=curve) == Crossing(0.5, "<"), "extrapolation is refused"
    with pytest.raises(ValueError, match="without any, nothing can leak"):
        leakage(4.0, 0, tokens=tokens, losses=curve)
    with pytest.raises(ValueError, match="`trained`"):
        compute_penalty(4.0, 0, tokens=tokens, losses=curve)


@given(st.floats(3.0, 5.9), st.floats(0, 1))
def test_absorption_is_what_the_region_adds_to_the_filter(filtered, absorbed):
    loss = filtered + absorbed * (6.0 - filtered)
    assert absorption(loss, filtered, perfect=6.0) == pytest.approx(absorbed, abs=1e-9)
    assert math.isnan(absorption(6.0, filtered=6.0, perfect=6.0)), "with all labels there is nothing to absorb"


def test_shares_need_something_to_be_a_share_of():
    assert math.isnan(share_relearned(0.5, 0.7, base=0.5)) and share_relearned(5.0, 4.0, base=3.0) == 0.5
    assert math.isnan(removed(4.0, dense=3.0, perfect=3.0)) and math.isnan(removed(4.0, dense=3.0, perfect=2.0))
    assert math.isnan(recovered(3.0, on=3.0, dense=3.0)) and math.isnan(recovered(2.0, on=3.0, dense=3.0))


@given(st.floats(0, 20), st.floats(0, 10), st.floats(0.01, 10))
def test_removed_is_linear_from_zero_to_one(ablated, dense, distance):
    perfect = dense + distance
    assert removed(dense, dense, perfect) == 0
    assert removed(perfect, dense, perfect) == 1
    assert removed(ablated, dense, perfect) * (perfect - dense) == pytest.approx(ablated - dense, abs=1e-9)


def test_removed_is_not_bounded_and_the_retain_tax_is_a_difference():
    assert removed(2.5, dense=3.0, perfect=4.0) == -0.5 and removed(5.0, dense=3.0, perfect=4.0) == 2
    assert retain_tax(3.5, 3.25) == 0.25 and retain_tax(3.0, 3.25) == -0.25


@given(st.floats(0, 20), st.floats(0, 10), st.floats(0.01, 10))
def test_recovered_is_linear_in_the_loss_with_the_region_on(on, dense, distance):
    ablated_loss = dense + distance
    assert recovered(ablated_loss, ablated_loss, dense) == 0
    assert recovered(ablated_loss, dense, dense) == 1
    assert recovered(ablated_loss, on, dense) * (ablated_loss - dense) == pytest.approx(ablated_loss - on, abs=1e-9)


def test_former_names_of_measures_warn():
    with pytest.warns(DeprecationWarning, match="way is now called removed"):
        assert way(5.0, unrouted=3.0, perfect=7.0) == 0.5
    with pytest.warns(DeprecationWarning, match="tax is now called retain_tax"):
        assert tax(3.75, filtered=3.5) == 0.25
    with pytest.warns(DeprecationWarning, match="Spread.of is now called Spread.from_values"):
        assert Spread.of([1.0]) == Spread(1.0, 1.0, 1.0, 1)


@pytest.mark.slow
def test_a_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    hits = 0
    for _ in range(200):
        counts = torch.randint(5, 30, (60,), generator=generator)
        sums = counts * 2.0 + torch.randn(60, generator=generator) * counts.sqrt()
        low, high = bootstrap(sums, counts, draws=300)
        hits += low < 2.0 < high
    assert 180 <= hits <= 199
    assert torch.equal(state, torch.get_rng_state())


def test_a_bootstrap_of_a_difference_pairs_the_documents():
    sums, counts = torch.rand(20) * 100, torch.full((20,), 10)
    low, high = bootstrap(sums + 5.0, counts, other=sums)
    assert low == pytest.approx(0.5) == high
    for bad in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="at least two documents"):
            bootstrap(bad, [1.0] * max(1, len(bad) - 1))


def test_a_spread_is_mean_and_range():
    assert Spread.from_values([1.0, 2.0, 6.0]).as_dict() == {"mean": 3.0, "min": 1.0, "max": 6.0, "n": 3}
    with pytest.raises(ValueError, match="at least one"):
        Spread.from_values([])


def test_activity_of_hidden_units_is_that_of_their_formula():
    tokenizer, model = byte_tokenizer(), with_region(tiny_llama(), size=5).double()
    forget, retain = TEXTS[:2], TEXTS[2:]
    found = region_activity(model, tokenizer, region="forget", forget=forget, retain=retain)
    assert [name.split(".")[-2:] for name in found] == [["0", "mlp"], ["1", "mlp"]]
    mlp = model.base_model.model.model.layers[0].mlp
    sides = []
    for texts in (forget, retain):
        hidden = []
        for text in texts:  # one by one, so that nothing is padded
            seen = []
            handle = mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(torch.tensor([[0, *tokenizer.encode(text)[:-1]]]))
            handle.remove()
            gate, up = (part["forget"].weight for part in (mlp.routed_gate, mlp.routed_up))
            hidden.append((F.silu(seen[0][0] @ gate.T) * (seen[0][0] @ up.T)).abs())
        sides.append(float(torch.cat(hidden).mean().detach()))
    first = next(iter(found.values()))
    assert (first.forget, first.retain) == (pytest.approx(sides[0], rel=1e-5), pytest.approx(sides[1], rel=1e-5))
    assert first.ratio == pytest.approx(sides[0] / sides[1], rel=1e-5)


def test_activity_of_lora_regions_and_of_regions_that_are_not_there():
    tokenizer = byte_tokenizer()
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]), "forget")
    randomize(model, "forget")
    found = region_activity(model, tokenizer, region="forget", forget=TEXTS[:1], retain=TEXTS[1:])
    assert len(found) == 4 and all(activity.forget > 0 and activity.retain > 0 for activity in found.values())
    with ablated(model, "forget"):  # its output is zeroed, its units still answer
        without = region_activity(model, tokenizer, region="forget", forget=TEXTS[:1], retain=TEXTS[1:])
    assert [without[name] == found[name] for name in found] == [True, True, False, False], (
        "only the first layer reads the same"
    )
    with pytest.raises(ValueError, match="no layer of this PeftModel has a region 'bio'"):
        region_activity(model, tokenizer, region="bio", forget=TEXTS, retain=TEXTS)
    model.merge_adapter()
    with pytest.raises(ValueError, match="takes no part in"):
        region_activity(model, tokenizer, region="forget", forget=TEXTS, retain=TEXTS)


def test_losses_of_documents_feed_the_bootstrap():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    loss = TextLoss(model, tokenizer, TEXTS * 3)
    low, high = bootstrap(loss.documents(model), loss.counts)
    assert low <= loss(model) <= high
