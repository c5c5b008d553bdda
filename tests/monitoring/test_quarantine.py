from __future__ import annotations

import pytest
from monitor_parts import rows

from routed_peft.monitoring import (
    apply_quarantine,
)


def test_treatments():
    data = rows(4)
    fixed = apply_quarantine(
        data, {"noise": "fix", "pattern": "route"}, fix=lambda row: {**row, "input_ids": [1]}, label="forget"
    )
    assert fixed["input_ids"][:] == [[1], [40, 80, 120, 160] * 2] * 2
    assert fixed["route_label"][:] == ["unlabeled", "forget"] * 2
    bare = apply_quarantine(data.remove_columns("route_label"), {"pattern": "route"}, label="forget")
    assert bare["route_quarantine"][:] == [None, "forget"] * 2 and "route_label" not in bare.column_names
    for treatment, missing in (("fix", "fix"), ("route", "label")):
        with pytest.raises(ValueError, match=f"to {treatment}: give `{missing}` too"):
            apply_quarantine(data, {"noise": treatment})
    with pytest.raises(ValueError, match=r"has \['nose'\], which `route_environment` does not hold"):
        apply_quarantine(data, {"nose": "drop"})
    per_token = data.rename_column("route_label", "route_labels")
    with pytest.raises(ValueError, match="the dataset has labels per token"):
        apply_quarantine(per_token, {"noise": "route"}, label="forget")
