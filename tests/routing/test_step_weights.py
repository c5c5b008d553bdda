from __future__ import annotations

import pytest
import torch
from reference import loss_of
from routing_parts import ROUTES, batch_of, two_regions

from routed_peft.routing.gradient_routing import GradientRouting


def test_multipliers():
    model, batch = two_regions("gpt2"), batch_of(3, padded=False)
    routing = GradientRouting(model, ROUTES, train_base=True)
    grads = []
    for labels, weights in (
        (["unlabeled"] * 3, {"base": torch.tensor([0.5, -0.75, 1.0])}),
        (["unlabeled"] * 3, {"base": torch.tensor([0.5, -0.75, 1.0])[:, None].expand(3, 6)}),
        (["mixed", "era", "unlabeled"], {"bio": torch.zeros(3)}),
    ):
        model.zero_grad()
        with routing(labels, weights):
            loss_of(model, batch).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-12)
        assert ".bio." not in name or not grads[2][name].any()
    with (
        pytest.raises(ValueError, match="one number per example or per position"),
        routing(["retain"] * 3, {"base": torch.ones(2)}),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"the groups are \['base', 'forget', 'bio'\]"),
        routing(["retain"], {"x": torch.ones(1)}),
    ):
        pass


def test_learning_counts_positions():
    model = two_regions("llama", torch.float32)
    routing = GradientRouting(model, ROUTES, train_base=True, joint=["norms"])
    reached = torch.tensor([[True, True, False], [True, False, False]])
    with pytest.warns(DeprecationWarning, match="count_learning_positions"):
        assert routing.learning(["forget", "retain"], reached) == routing.count_learning_positions(
            ["forget", "retain"], reached
        )
    assert routing.count_learning_positions(["forget", "retain"], reached) == {
        "base": 1,
        "joint": 3,
        "forget": 2,
        "bio": 3,
    }


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["forget", "retian"], "no route for the label 'retian'"),
        (torch.tensor([0, 7]), "got values from 0 to 7"),
        (torch.tensor([0.0, 1.0]), "integers of shape"),
        (["forget"], "do not line up"),
        (torch.zeros(2, 5, dtype=torch.long), "do not line up"),
    ],
)
def test_bad_labels(labels, message):
    model, batch = two_regions("llama"), batch_of(2)
    routing = GradientRouting(model, ROUTES, train_base=True)
    with pytest.raises(ValueError, match=message), routing(labels):
        model(**batch)
