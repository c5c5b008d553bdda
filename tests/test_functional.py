from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routed_peft import functional
from routed_peft.functional import PositionWeights, RowCache, routed_linear

WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, -0.75, 2.0]), min_size=24, max_size=24)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=WEIGHTS, per_token=st.booleans(), gather=st.booleans(), bias=st.booleans(), outputs=st.sampled_from([2, 7])
)
def test_parameter_gradients_weigh_positions(weights, per_token, gather, bias, outputs):
    """However they are computed (runs, gathered, multiplied): the sum over positions of weight times gradient."""
    generator = torch.Generator().manual_seed(0)
    m = torch.tensor(weights, dtype=torch.float64)
    m = m.reshape(4, 6) if per_token else m[:4]
    x = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    w = torch.randn(outputs, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    b = torch.randn(outputs, dtype=torch.float64, generator=generator, requires_grad=True) if bias else None
    g = torch.randn(4, 6, outputs, dtype=torch.float64, generator=generator)
    routed_linear(x, w, m=PositionWeights.from_weights(m, gather), bias=b).backward(g)
    weighed = g * (m.unsqueeze(-1) if per_token else m[:, None, None])
    assert torch.allclose(w.grad, torch.einsum("bto,btd->od", weighed, x), atol=1e-12)
    assert torch.allclose(x.grad, g @ w, atol=1e-12)
    assert b is None or torch.allclose(b.grad, weighed.sum((0, 1)), atol=1e-12)


@pytest.mark.parametrize(
    ("m", "runs", "gathered"),
    [
        ([0.0, 1.0, 1.0, 0.5, 0.0], ((1, 3, 1.0), (3, 4, 0.5)), True),
        ([0.0] * 4, (), True),
        ([1.0] * 9 + [0.0], ((0, 9, 1.0),), False),
        ([1.0, 2.0] * 9, None, False),
    ],
)
def test_how_positions_are_left_out(m, runs, gathered):
    weights = PositionWeights.from_weights(torch.tensor(m))
    assert weights.runs == runs and (weights.index is not None) == gathered
    assert PositionWeights.from_weights(torch.tensor(m), gather=False).runs is None


@pytest.mark.parametrize("m", [[1.0, 0.0, 1.0, 0.5] * 5, [0.0, 0.0, 1.0, 0.5] * 5], ids=["multiplied", "gathered"])
def test_layers_that_read_the_same_input_take_its_rows_once_and_others_do_not_get_them(m, monkeypatch):
    taken = []
    real = functional._rows
    monkeypatch.setattr(functional, "_rows", lambda x, *rest: taken.append(x.shape) or real(x, *rest))
    m = torch.tensor(m, dtype=torch.float64)
    weights = PositionWeights.from_weights(m)
    x, cache = torch.randn(20, 20, dtype=torch.float64), RowCache()
    turned = x.t()  # the same memory and shape in another order
    inputs = [x, x, turned, x.clone(), x]
    layers = [torch.randn(30 + i, 20, dtype=torch.float64, requires_grad=True) for i in range(len(inputs))]
    sum(routed_linear(i, w, m=weights, cache=cache).sum() for i, w in zip(inputs, layers, strict=True)).backward()
    for i, w in zip(inputs, layers, strict=True):
        torch.testing.assert_close(w.grad, (m[:, None] * i).sum(0).expand_as(w))
    assert taken.count(x.shape) == 4, "the two neighbors share one copy"


def test_an_input_that_was_changed_in_place_is_taken_anew():
    weights = PositionWeights.from_weights(torch.tensor([1.0, 2.0] * 9))
    w, cache = torch.zeros(3, 2, requires_grad=True), RowCache()
    x = torch.ones(18, 2)
    for value in (1.0, 5.0):
        x.fill_(value)
        w.grad = None
        routed_linear(x, w, m=weights, cache=cache).sum().backward()
        assert torch.equal(w.grad, torch.full((3, 2), 27 * value))


def test_low_precision_rounds_a_sum_over_runs_once():
    """Adding up runs in bfloat16 would round after each of them."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(8, 64, n, generator=generator).bfloat16() for n in (5, 7))
    weight = torch.zeros(7, 5, dtype=torch.bfloat16, requires_grad=True)
    m = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    assert len(PositionWeights.from_weights(m).runs) == 4
    routed_linear(x, weight, m=m).backward(grad)
    rows = m.nonzero().squeeze(1)
    once = grad[rows].reshape(-1, 7).t() @ x[rows].reshape(-1, 5)
    assert torch.equal(weight.grad, once)


def test_weights_go_to_a_device_whole():
    weights = PositionWeights.from_weights(torch.tensor([0.0, 0.5, 1.0, 0.0])).to(torch.device("meta"))
    assert {t.device.type for t in (weights.m, weights.index, weights.kept)} == {"meta"} and weights.runs
