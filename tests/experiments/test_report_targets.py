from __future__ import annotations

import math

from report_parts import attacked_cell, cell, cells, curve

from experiments.report.aggregate import aggregate
from experiments.report.targets import targets


def test_an_attack_that_fails_in_some_seeds_meets_no_target():
    """The mean over seeds is then higher than what the attacker reaches: it can show that a target is missed, but not met."""

    def robust(*routed_models):
        rows = [row | {"seed": seed} for seed in range(len(routed_models)) for row in cells()[:4]]
        found = {t.kind: t for t in targets(aggregate([*rows, *routed_models]))}
        return found["robust"].met, found["filter"].met, found["robust"].measured

    held, fallen = (attacked_cell(0, [6.0, 5.5, 5.5]), attacked_cell(0, [6.0, 3.0, 2.5]))
    broken = [attacked_cell(seed, [6.0, math.nan, math.nan], status="diverged") for seed in (1, 2)]
    assert robust(held, held | {"seed": 1}, held | {"seed": 2}) == (True, True, "5.50 ‡ against 4.00 ‡")
    assert robust(held, *broken) == (None, None, "5.83 (5.50–6.00) ‡ against 4.00 ‡")
    assert robust(fallen, fallen | {"seed": 1}, broken[1]) == (False, None, "3.67 (2.50–6.00) ‡ against 4.00 ‡")


def test_targets_are_met_or_missed_by_the_numbers():
    verdicts = {target.wanted: target for target in targets(aggregate(cells()))}
    removed = verdicts["50 % of the labels: at least 95 % removed"]
    assert removed.met is False and removed.measured == "66.7 %" and removed.verdict == "missed, on 1 seed only"
    assert [target.met for target in verdicts.values() if target.kind == "tax"] == [False]
    above = verdicts[
        "50 % of the labels: forget loss after the worst attack above that of the filter with the same labels"
    ]
    assert above.met is True and above.measured == "3.50 against 2.90 ‡"
    assert (
        verdicts["50 % of the labels: forget loss after the worst attack within 5 % of the perfect filter’s"].met
        is False
    )
    on = verdicts["50 % of the labels: with its region on, at most 0.10 nats above no routing on both sides"]
    assert on.met is True and on.measured == "forget +0.05, retain +0.05"
    placebo = verdicts["no routing, extra units ablated (placebo): removes less than 10 % of what routing removes"]
    assert placebo.met is False and placebo.measured == "12 %"
    rows = [*cells(labeled=1.0), cell("rmu", 5.0, 3.6, 1.0, attacks={"forget": [curve(1e-3, [5.0, 2.9, 2.8])]})]
    steps = {target.wanted: target for target in targets(aggregate(rows)) if "steps to recover" in target.wanted}
    assert [target.met for target in steps.values()] == [None, True], "bounds against a bound tell nothing"
    assert (
        steps["all labels, attack “forget”: at least 3 × the steps to recover of RMU"].measured == "> 3 against 0.943"
    )


def test_targets_of_a_variant_are_told_where_there_is_nothing_else():
    rows = [row | {"method": row["method"].replace("routed", "routed:by_document=true")} for row in cells()]
    assert [t.met for t in targets(aggregate(rows)) if t.kind == "tax"] == [False]


def undone(alpha, after, between=4.0, seed=0):
    attacks = {"forget": [curve(1e-3, [5.0, between, after])]}
    return cell(f"undo-{alpha}", 5.0, 3.6, 0.5, seed, attacks=attacks)


def test_undo_must_hold_out_longer_with_more_noise_and_like_the_oracle_when_distilled_afresh():
    rows = [*cells(), undone("0.2", 3.0), undone("0.8", 3.4), undone("1", 3.9)]
    found = {
        target.wanted: target
        for target in targets(aggregate(rows))
        if "UNDO" in target.wanted or "afresh" in target.wanted
    }
    rises, fresh = found.values()
    assert rises.met and rises.measured == "3.00 ‡ 3.40 ‡ 3.90 ‡"
    assert fresh.met is None and fresh.measured == "> 3 against > 3", "neither recovers, so it cannot be told"
    rows = [*cells(), undone("0.2", 3.0), undone("0.8", 2.9), undone("1", 2.9, between=2.95)]
    rises, fresh = (t for t in targets(aggregate(rows)) if "UNDO" in t.wanted or "afresh" in t.wanted)
    assert rises.met is False and fresh.met is False, "it recovers before the oracle would"
    none = {"forget": [curve(1e-3, [5.0, 5.1, 5.2], status="diverged")]}
    rows = [*cells(), undone("0.2", 3.0), cell("undo-1", 5.0, 3.6, 0.5, attacks=none)]
    rises, fresh = (t for t in targets(aggregate(rows)) if "UNDO" in t.wanted or "afresh" in t.wanted)
    assert rises.met is None and fresh.met is None, "an attack that diverged says nothing of robustness"


def one_target(kind, rows):
    """Return the only target of a kind."""
    (found,) = (target for target in targets(aggregate(rows)) if target.kind == kind)
    return found


def changed(method, seeds=(0,), **numbers):
    """Return the cells of an experiment with some seeds, where one method has other numbers."""
    return [row | (numbers if row["method"] == method else {}) for seed in seeds for row in cells(seed)]


def test_a_goal_on_both_sides_is_missed_by_either():
    """No routing has losses of 3.0 and 3.5."""
    for forget, retain, met in ((3.05, 3.55, True), (3.05, 3.7, False), (3.2, 3.55, False), (2.0, 3.7, False)):
        rows = changed("routed", region_on_forget_loss=forget, region_on_retain_loss=retain)
        assert one_target("on", rows).met is met, (forget, retain)


def test_each_goal_has_its_limit_on_the_right_side():
    """Retain losses are 3.4 of the filter; forget losses 3.0 without routing, 5.0 routed and 6.0 of the perfect filter."""
    for kind, number, better, worse in (("tax", "retain_loss", 3.44, 3.46), ("removed", "forget_loss", 5.9, 5.8)):
        assert [one_target(kind, changed("routed", **{number: it})).met for it in (better, worse)] == [True, False], (
            kind
        )
    assert [one_target("placebo", changed("control", forget_loss=it)).met for it in (3.19, 3.21)] == [True, False]
    held = [one_target("robust", [*cells()[:4], attacked_cell(0, [6.0, 5.0, it])]) for it in (3.81, 3.79)]
    assert [target.met for target in held] == [True, False], "95 % of 4.0"


def test_a_comparison_has_as_many_seeds_as_the_model_with_fewer():
    """A target that compares two models says so where one of them has a single seed."""
    rows = changed("none", seeds=(0, 1, 2))
    single = [row for row in rows if row["seed"] == 0 or row["method"] == "routed"]
    for kind in ("on", "robust", "filter", "placebo"):
        assert one_target(kind, rows).seeds == 3
        assert one_target(kind, single).seeds == 1 and "1 seed only" in one_target(kind, single).verdict
