from __future__ import annotations

import json
from dataclasses import replace

import pytest
from report_parts import attacked_cell, cell, cells, curve, routed_result

from experiments.report.aggregate import aggregate
from experiments.report.costs import costs
from routed_peft.evaluation.measures import Crossing, Spread

RIGHT = (1.0, 1.0)


def test_losses_removal_and_retain_tax_are_compared_within_a_seed():
    rows = [
        *cells(0),
        *[row | {"seed": 1} for row in cells() if row["method"] != "filter"],
        cell("routed", 6.0, 3.0, 0.5, seed=7),
    ]
    result = routed_result(rows)
    assert result.forget == Spread(pytest.approx(16 / 3), 5.0, 6.0, 3) and result.retain.n == 3
    assert result.removed == Spread(pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 2), (
        "seed 7 has no ends"
    )
    assert result.retain_tax_same_labels == Spread(pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 1), (
        "seed 1 has no filter"
    )
    assert aggregate(rows).get("control").retain_tax_same_labels.mean == pytest.approx(0.2), (
        "there is only one filter to compare with"
    )
    assert aggregate([*rows, cell("filter", 3.2, 3.4, 0.1)]).get("control").retain_tax_same_labels is None


def test_a_removal_that_cannot_be_told_is_none():
    rows = [row | {"forget_loss": 2.0} if row["method"] == "perfect_filter" else row for row in cells()]
    assert routed_result(rows).removed is None
    assert routed_result([row for row in cells() if row["method"] == "routed"]).retain_tax_same_labels is None


def test_the_worst_attack_is_the_one_that_ends_lowest():
    row = attacked_cell(0, [5.0, 4.0, 3.0])
    row["attacks"]["mixed"] = [curve(1e-3, [5.0, 4.0, 2.0])]
    assert routed_result([row]).worst.forget[-1].mean == 2.0


def test_what_one_attack_spared_is_not_the_more_robust():
    rows = cells()
    rows[0]["attacks"]["mixed"] = [curve(1e-3, [3.0, 2.5, 2.4])]
    found = aggregate(rows)
    assert found.get("no_routing").worst.forget[-1].mean == 2.4
    assert found.get("perfect_filter").worst is None, "not attacked in every way"


def test_facts_are_compared_with_facts():
    """An attack that scores other text has a reference of its own, and is not the worst case on held-out documents."""
    rows = cells()
    for row in rows:
        row["attacks"]["facts"] = [curve(1e-3, [2.0, 1.5, 1.0] if row["method"] == "no_routing" else [4.0, 3.0, 2.5])]
    found = aggregate(rows)
    assert found.get("no_routing").attacks["facts"].recovery == Crossing(0)
    assert found.get("filter", 0.5, RIGHT).attacks["facts"].recovery.relation == ">", "back at text's 3.0, not at 2.0"
    worst = found.get("filter", 0.5, RIGHT).worst
    assert worst == found.get("filter", 0.5, RIGHT).attacks["forget"]


def test_numbers_do_not_depend_on_the_order_of_cells():
    rows = [row for seed in (0, 1) for row in cells(seed)]
    one, other = routed_result(rows), routed_result(rows[::-1])
    assert one.removed == other.removed and one.attacks == other.attacks
    assert json.dumps(one.forget.as_dict()) == json.dumps(other.forget.as_dict())
    assert replace(one, cells={}) == replace(other, cells={})


def test_costs_are_read_off_the_filters_of_the_experiment():
    def row(method, forget, retain, sides, flops, labeled=None, **more):
        ledger = {"flops": flops, "serial_steps": 10, "tokens": 100, "labeled_forget_tokens": 7}
        tokens = dict(zip(("forget", "retain"), sides, strict=True))
        return cell(method, forget, retain, labeled, tokens_by_side=tokens, ledger=ledger, **more)

    u = {"unlabeled_tokens_by_side": {"forget": 150, "retain": 100}}
    rows = [
        row("no_routing", 3.0, 3.6, (400, 100), 100),
        row("filter", 4.0, 3.4, (200, 200), 100, 0.5),
        row("filter", 5.0, 3.3, (100, 300), 100, 0.75),
        row("perfect_filter", 6.0, 3.2, (0, 400), 100),
        row("routed", 4.5, 3.5, (200, 200), 125, 0.5, region_activity_ratio=[2.0, None, 4.0], **u),
        row("sgtm", 5.5, 3.1, (200, 200), 100, 0.5, **u),
        row("demix", 5.5, 3.1, (200, 200), 100, 0.5),
        row("era", 4.5, 3.5, (200, 200), 100, 0.9),
    ]
    found = aggregate(rows)
    routed_costs, sgtm, era, demix, filtered = (
        costs(found, found.get(m, s, (1.0, 1.0)))
        for m, s in [("routed", 0.5), ("sgtm", 0.5), ("era", 0.9), ("demix", 0.5), ("filter", 0.5)]
    )
    assert routed_costs.compute.mean == 1.25 and routed_costs.serial_steps == 10 and routed_costs.labeled == 7
    assert routed_costs.activity.mean == 3.0
    assert routed_costs.penalty.at == pytest.approx(1 - 2**0.5 / 2), (
        "the retain loss of plain training on 141 tokens, not 200"
    )
    assert routed_costs.leakage.at == pytest.approx(100 * 2**0.5 / 150), (
        "as if 141 of the 150 unlabelled tokens had been let through"
    )
    assert filtered.leakage == Crossing(1.0) and demix.leakage is None, "it is not known how many it was trained on"
    assert (
        routed_costs.absorption.mean == pytest.approx(0.25) and filtered.absorption.mean == 0 and routed_costs.is_known
    )
    assert str(sgtm.leakage) == f"< {100 / 150:.4g}" and sgtm.penalty.relation == "<", (
        "beyond what filters tell: a bound"
    )
    assert era.leakage is None and era.absorption is None, "no filter has these labels"
    assert not costs(aggregate(cells()[:1]), aggregate(cells()[:1]).get("no_routing")).is_known
