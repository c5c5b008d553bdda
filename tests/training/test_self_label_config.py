from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from routed_peft.training.self_label_config import SETTING_NAMES, SelfLabelConfig, setting


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labeled_first": 0.0}, "`labeled_first` is a share of the run, between 0 and 1; got 0"),
        (
            {"labeled_first": 0.2, "score_again_at": 0.2},
            r"`score_again_at` is .* between `labeled_first` \(0.2\) and 1; got 0.2",
        ),
        ({"robust_share": 1.0}, "`robust_share` is a share"),
        ({"threshold": "mean"}, r"`threshold` must be one of \('balanced', 'median', 'midpoint'\), got 'mean'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfLabelConfig(**settings)


def test_fields_of_recipes_keep_help_and_choices():
    @dataclass
    class Recipe:
        threshold: str = setting("threshold")
        labeled_first: float = setting("labeled_first", 0.0)

    own = {field.name: field for field in fields(SelfLabelConfig)}
    assert Recipe() == Recipe("balanced", 0.0) and all(own[name].metadata["help"] for name in SETTING_NAMES)
    assert all(field.metadata == own[field.name].metadata for field in fields(Recipe))
