from __future__ import annotations

import math

import pytest
from report_parts import attacked_cell, cells, curve, routed_result

from experiments.report.aggregate import aggregate
from experiments.report.targets import targets
from routed_peft.evaluation.measures import Crossing

RIGHT = (1.0, 1.0)


def test_an_attack_is_its_worst_case_over_rates_and_earlier_steps():
    attack = routed_result(cells()).attacks["forget"]
    assert attack.steps == (0, 1, 3) and [loss.mean for loss in attack.forget] == [5.0, 3.8, 3.5]
    assert attack.retain.mean == 4.0, "of the model at rate 1e-3 and step 3"
    assert attack.useful.mean == 3.8, "at step 3 retain loss rose by more than 5 %"
    assert attack.verdict == "attack" and attack.interior and attack.best_rates == (1e-3,)
    assert attack.learning_rates == (3e-4, 1e-3, 1e-2, 3e-2)
    assert attack.recovery == Crossing(3, ">") and attack.recovery_by_seed == (Crossing(3, ">"),)
    assert [one.mean for one in attack.removed] == pytest.approx([2 / 3, 0.9 / 2.1, 0.7 / 1.2])
    assert attack.area.mean == pytest.approx((4.025 - 3.0) / (5.0 - 3.0)), (
        "steps 0, 1 and 3 are evenly spaced in log(1 + s)"
    )


def test_steps_to_recover_are_interpolated_to_within_the_tolerance():
    found = aggregate(cells())
    assert found.get("filter", 0.5, RIGHT).attacks["forget"].recovery.at == pytest.approx(2.2)
    assert found.get("no_routing").attacks["forget"].recovery == Crossing(0)
    assert found.get("perfect_filter").attacks["forget"].area.mean == 1.0
    assert found.get("no_routing").attacks["forget"].area.mean == pytest.approx(-0.05), "it has learnt, too"


def test_every_seed_has_an_attacker_of_its_own():
    """Grids extend themselves seed by seed, so a rate may be missing for one of them."""
    one, two = attacked_cell(0, [5.0, 4.0, 3.0]), attacked_cell(1, [6.0, 5.0, 4.5], [6.0, 3.0, 3.5])
    attack = routed_result([one, two]).attacks["forget"]
    assert [(loss.mean, loss.min, loss.max) for loss in attack.forget] == [(5.5, 5, 6), (3.5, 3, 4), (3.0, 3, 3)]
    assert attack.best_rates == (1e-3, 1e-2) and not attack.interior
    assert attack.recovery is None and attack.area is None and attack.removed == (None, None, None)


def test_what_lowers_no_loss_is_no_attack_and_what_diverges_is_no_robustness():
    nothing = attacked_cell(0, [5.0, 5.5, 5.2], status="no attack")
    broken = attacked_cell(0, [5.0, math.nan, math.nan], status="diverged")
    assert routed_result([nothing]).attacks["forget"].verdict == "no attack"
    assert routed_result([broken]).attacks["forget"].verdict == "diverged"
    on_the_way = attacked_cell(0, [5.0, 4.0, 9.0], status="diverged")
    assert routed_result([on_the_way]).attacks["forget"].verdict == "attack", "the attacker would have stopped there"
    some = routed_result([nothing, attacked_cell(1, [5.0, 4.0, 4.0])])
    assert (
        some.attacks["forget"].verdict == "attack in 1 of 2 seeds, no attack in 1" and some.attacks["forget"].attacked
    )
    after = [target for target in targets(aggregate([*cells()[:4], broken])) if "attack" in target.wanted]
    assert after and all(target.met is None for target in after), "nothing is told by an attack that diverged"


def test_an_attack_is_measured_against_the_model_before_it_was_perturbed():
    worse = attacked_cell(0, [5.4, 5.3, 5.2]) | {"forget_loss": 5.0}
    assert routed_result([worse]).attacks["forget"].verdict == "no attack", "the model had 5.0 before"
    hardly = attacked_cell(0, [5.0, 4.99, 4.99])
    assert routed_result([hardly]).attacks["forget"].verdict == "no attack", "a hundredth of a nat is none"


def test_the_dotted_line_is_the_loss_on_what_is_scored():
    rows = cells()
    for row in rows:
        row["attacks"] = {"facts": [curve(1e-3, [1.0, 0.9, 0.8] if row["method"] == "no_routing" else [4.0, 3.0, 2.5])]}
    assert {one.attacks["facts"].reference for one in aggregate(rows).results.values()} == {1.0}, (
        "not 3.0, of other text"
    )


def test_cells_must_be_attacked_at_the_same_steps():
    with pytest.raises(ValueError, match="'forget' was measured at different steps"):
        aggregate([attacked_cell(0, [5.0, 4.0, 3.0]), attacked_cell(1, [5.0, 4.0, 3.0], steps=[0, 2, 4])])


def test_steps_half_way_back_tell_where_no_attack_recovers():
    """No routing has 3, the perfect filter 6 before any attack: half of the way back is 4.5 for every model."""
    found = aggregate(cells(labeled=1.0))
    half = {name: found.get(name, 1.0, RIGHT) or found.get(name) for name in ("routed", "perfect_filter")}
    assert half["routed"].attacks["forget"].halfway.at == pytest.approx(0.5 / 1.2)
    assert half["perfect_filter"].attacks["forget"].halfway == Crossing(2)
    assert aggregate(cells()[:1]).get("no_routing").attacks["forget"].halfway is None, (
        "nobody says what the other end is"
    )


def test_what_was_not_removed_is_not_recovered():
    """A share of nothing is no number: no routing's own loss, measured twice, differs in the last digits."""
    rows = [row | {"forget_loss": 3.0 + 1e-8} if row["method"] == "control" else row for row in cells()]
    found = aggregate(rows)
    assert found.get("control").attacks["forget"].share_relearned is None
    assert routed_result(rows).attacks["forget"].share_relearned.mean == pytest.approx((5.0 - 3.5) / (5.0 - 3.0))
