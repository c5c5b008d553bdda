"""Every loss in float64 against the formula of its paper, written out with loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from routed_peft.unlearning import losses

B, T, V, D = 3, 5, 7, 6


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets() -> Tensor:
    labels = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(9))
    labels[1, 3:] = -100
    return labels


def softmax(row: Tensor) -> list[float]:
    weights = [math.exp(x) for x in row.tolist()]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_token_log_probs():
    logits, labels = random(B, T, V), targets()
    got = losses.token_log_probs(logits, labels)
    assert got.shape == (B, T - 1)
    for b in range(B):
        for t in range(T - 1):
            wanted = int(labels[b, t + 1])
            expected = 0.0 if wanted == -100 else math.log(softmax(logits[b, t])[wanted])
            assert got[b, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_npo(beta):
    now, before = random(B), random(B, seed=1)
    expected = [
        -2 / beta * math.log(sigmoid(-beta * (a - b))) for a, b in zip(now.tolist(), before.tolist(), strict=True)
    ]
    assert losses.npo(now, before, beta).tolist() == pytest.approx(expected, abs=1e-12)


def test_npo_is_gradient_ascent_as_beta_vanishes():
    now = random(B).requires_grad_()
    losses.npo(now, random(B, seed=1), beta=1e-7).sum().backward()
    assert torch.allclose(now.grad, torch.ones(B, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_simnpo(margin):
    now, lengths, beta = -random(B).abs() * 10, torch.tensor([2, 3, 9]), 2.5
    pairs = zip(now.tolist(), lengths.tolist(), strict=True)
    expected = [-2 / beta * math.log(sigmoid(-beta / n * total - margin)) for total, n in pairs]
    assert losses.simnpo(now, lengths, beta=beta, margin=margin).tolist() == pytest.approx(expected, abs=1e-12)


def test_uniform_divergence():
    logits = random(B, V)
    expected = [kl([1 / V] * V, softmax(row)) for row in logits]
    assert losses.uniform_divergence(logits).tolist() == pytest.approx(expected, abs=1e-12)


def test_divergence_is_forward():
    teacher, student = random(B, V), random(B, V, seed=1)
    expected = [kl(softmax(p), softmax(q)) for p, q in zip(teacher, student, strict=True)]
    assert losses.divergence(teacher, student).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", range(1, V + 1))
def test_topk_divergence(k):
    teacher, student = random(B, V), random(B, V, seed=1).requires_grad_()
    got = losses.topk_divergence(losses.topk_log_probs(teacher, k), student)
    expected = []
    for p, q in zip(map(softmax, teacher), map(softmax, student.detach()), strict=True):
        kept = sorted(range(V), key=lambda v: -p[v])[:k]
        rest = [v for v in range(V) if v not in kept]
        tails = [(sum(p[v] for v in rest), sum(q[v] for v in rest))] if rest else []
        expected.append(sum(a * math.log(a / b) for a, b in [*((p[v], q[v]) for v in kept), *tails]))
    assert got.tolist() == pytest.approx(expected, abs=1e-12)
    full = losses.divergence(teacher, student)
    assert bool((got <= full + 1e-12).all())
    got.sum().backward()
    assert student.grad.isfinite().all()
    if k == V:
        (exact,) = torch.autograd.grad(full.sum(), student)
        assert torch.allclose(student.grad, exact, atol=1e-12)


def test_topk_divergence_vanishes_only_where_the_kept_entries_agree():
    teacher = random(B, V)
    parts = losses.topk_log_probs(teacher, 3)
    assert losses.topk_divergence(parts, teacher).abs().max() < 1e-12
    assert losses.topk_divergence(parts, teacher + random(B, V, seed=2)).min() > 1e-3


def test_squared_distance():
    hidden, wanted = random(B, T, D), random(D, seed=1)
    expected = [[sum((h - w) ** 2 for h, w in zip(row, wanted.tolist(), strict=True)) / D for row in rows]
                for rows in hidden.tolist()]  # fmt: skip
    assert torch.allclose(
        losses.squared_distance(hidden, wanted), torch.tensor(expected, dtype=torch.float64), atol=1e-12
    )


def test_steering_vector_is_one_direction_and_may_point_anywhere():
    state = torch.get_rng_state()
    vectors = [losses.steering_vector(64, seed) for seed in range(20)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(vectors[3], losses.steering_vector(64, 3))
    assert all(vector.norm().item() == pytest.approx(1.0, abs=1e-6) for vector in vectors)
    negative = torch.stack(vectors).lt(0).double().mean().item()
    assert 0.45 < negative < 0.55, "torch.rand would give 0: the positive orthant"
