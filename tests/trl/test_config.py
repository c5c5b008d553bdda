from __future__ import annotations

import pytest
from trl_parts import PLAIN

from routed_peft.trl import RoutedGRPOConfig, RoutedSFTConfig


def grpo(**options) -> RoutedGRPOConfig:
    return RoutedGRPOConfig("out", **(PLAIN | options))


def test_anchors_are_a_quarter_where_environments_are_trusted_and_none_elsewhere():
    assert grpo().anchor_share == 0.0
    assert grpo(anchor_environments=["A"]).anchor_share == 0.25
    assert grpo(anchor_environments=["A"], anchor_share=0.5).anchor_share == 0.5
    assert grpo(anchor_share=0.5).anchor_environments is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_share": 1.0}, "from 0 to below 1, got 1.0"),
        ({"anchor_share": -0.1}, "from 0 to below 1, got -0.1"),
        ({"anchor_share": float("nan")}, "from 0 to below 1, got nan"),
        ({"anchor_environments": ["A"], "anchor_share": 0.0}, "`anchor_share` is 0: set a share"),
        ({"baseline_over": "flagged"}, "`baseline_over` .* got 'flagged'"),
        (
            {"baseline_over": "unflagged", "multi_objective_aggregation": "normalize_then_sum"},
            'needs `multi_objective_aggregation="sum_then_normalize"`',
        ),
        ({"region_learning_rate": -1.0}, "`region_learning_rate` must be a number from 0"),
    ],
)
def test_what_would_be_wrong_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo(**options)


def test_routed_gradients_are_zero_and_never_none_so_ddp_need_not_look_for_unused_parameters():
    for config in (
        grpo,
        lambda **options: RoutedSFTConfig("out", bf16=False, use_cpu=True, report_to="none", **options),
    ):
        assert config().ddp_find_unused_parameters is False
        assert config(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


def test_groups_are_clipped_apart_unless_told_otherwise_and_lists_are_not_shared():
    assert grpo().clip_per_group is True and grpo(clip_per_group=False).clip_per_group is False
    grpo().flagged_labels.append("odd")
    assert grpo().flagged_labels == ["flagged"]
