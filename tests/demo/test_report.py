from __future__ import annotations

import math

import pytest

from routed_peft.demo.report import derive, verdict


def test_derived_numbers_of_a_known_case():
    losses = {"no_routing": (3.0, 3.5), "filter": (3.2, 3.4), "routed": (5.0, 3.5), "perfect_filter": (6.0, 3.3)}
    models = {
        key: {"forget_loss": forget, "retain_loss": retain, "relearned": {0: forget, 5: forget / 2}}
        for key, (forget, retain) in losses.items()
    }
    derived = derive(models)
    assert derived["removed"] == pytest.approx(2 / 3) and derived["retain_tax"] == pytest.approx(0.2)
    assert derived["retain_tax_same_labels"] == pytest.approx(0.1)
    assert derived["removed_by_filter"] == pytest.approx(0.2 / 3)
    assert derived["removed_relearned"] == {5: pytest.approx(2 / 3)}
    assert "67 %" in verdict(derived) and "7 %" in verdict(derived) and "cost 0.10" in verdict(derived)
    assert "gained 0.10" in verdict({**derived, "retain_tax_same_labels": -0.1})
    assert verdict({**derived, "removed": math.nan}).startswith("Too little was learned to tell")
