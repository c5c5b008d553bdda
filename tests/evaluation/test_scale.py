from __future__ import annotations

import pytest
import torch
from trl_parts import two_loras

from routed_peft import ablated
from routed_peft.evaluation import choose_scale


def test_the_largest_scale_below_the_limit_is_chosen():
    model = two_loras().eval()
    ids = torch.tensor([[4, 5, 6]])

    @torch.no_grad()
    def rate() -> float:
        return float(model(input_ids=ids).logits[0, -1].softmax(-1)[7])

    choice = choose_scale(model, "forget", rate=rate, limit=1.0, scales=[1.0, 0.0, 0.5])
    assert choice.scale == 1.0 and list(choice.rates) == [0.0, 0.5, 1.0]
    for scale, found in choice.rates.items():
        with ablated(model, "forget", scale=scale):
            assert rate() == found
    assert len(set(choice.rates.values())) == 3
    limit = sorted(choice.rates.values())[1]  # only the lowest rate is below it
    assert choose_scale(model, "forget", rate=rate, limit=limit, scales=[0.0, 0.5, 1.0]).scale == min(
        choice.rates, key=choice.rates.get
    )


def test_none_is_chosen_where_even_the_ablated_model_is_flagged():
    assert choose_scale(two_loras(), "forget", rate=lambda: 0.5, limit=0.5).scale is None
    with pytest.raises(ValueError, match="`scales` is empty"):
        choose_scale(two_loras(), "forget", rate=lambda: 0.5, limit=0.5, scales=[])
    with pytest.raises(ValueError, match="`regions` must be among"):
        choose_scale(two_loras(), "hack", rate=lambda: 0.5, limit=0.5)
