"""Losses of output-based unlearning, as pure functions of logits, log-probabilities and activations.

Shapes: ``B`` rows, ``T`` positions, ``V`` vocabulary entries, ``D`` features, ``k`` kept entries. No function reduces over
rows or positions: callers take means over the tokens, or rows, of a whole optimizer step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from routed_peft.losses import token_losses


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Log-probability of every token under the position before it, ``(B, T - 1)`` in nats; 0 where there is no loss.

    .. math:: \ell_{bt} = \log p(x_{b,t+1} \mid x_{b,\le t})

    of ``logits`` ``(B, T, V)`` and ``targets`` ``(B, T)``, token ids or -100. Minimizing it is *gradient ascent* on the loss.

    >>> token_log_probs(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]]))
    tensor([[-1.3863, -0.0000]])
    """
    return -token_losses(logits, targets)


def npo(log_probs: Tensor, reference_log_probs: Tensor, beta: float = 0.1) -> Tensor:
    r"""Negative preference optimization (NPO; Zhang et al., arXiv 2404.05868).

    .. math:: L = \frac{2}{\beta} \log\Bigl(1 + \Bigl(\frac{\pi_\theta(y)}{\pi_{\mathrm{ref}}(y)}\Bigr)^{\!\beta}\Bigr)

    Gradient ascent whose weight :math:`2\sigma(\beta \log \pi_\theta / \pi_{\mathrm{ref}})` fades as the row becomes less
    likely than it was; as :math:`\beta \to 0` it is 1 everywhere. Log-probabilities ``(B,)`` are summed over the tokens of each
    row; the reference is the frozen model from before.

    >>> npo(torch.tensor([-9.0, -50.0]), torch.tensor([-9.0, -9.0]), beta=0.1)
    tensor([13.8629,  0.3287])
    """
    return 2 / beta * F.softplus(beta * (log_probs - reference_log_probs))


def simnpo(log_probs: Tensor, lengths: Tensor, *, beta: float = 2.5, margin: float = 0.0) -> Tensor:
    r"""SimNPO (Fan et al., arXiv 2410.07163): NPO without a reference, by the mean log-probability of a row.

    .. math:: L = -\frac{2}{\beta} \log\sigma\Bigl(-\frac{\beta}{|y|} \log\pi_\theta(y) - \gamma\Bigr)

    with log-probabilities ``(B,)`` summed over the tokens of each row, and :math:`|y|` its ``lengths`` ``(B,)``.

    >>> simnpo(torch.tensor([-10.0]), torch.tensor([5]), beta=2.5)
    tensor([0.0054])
    """
    return 2 / beta * F.softplus(beta * log_probs / lengths + margin)


def uniform_divergence(logits: Tensor) -> Tensor:
    r"""MaxEnt: divergence of predictions from uniform; it makes the default teacher of UNDO (arXiv 2506.06278).

    .. math:: \mathrm{KL}(U \,\|\, p) = -\log V - \frac{1}{V} \sum_v \log p_v

    in nats, ``(...)`` for logits ``(..., V)``; 0 where all logits are equal.

    >>> uniform_divergence(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    tensor([0.0000, 0.4338])
    """
    return logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    r"""Forward KL divergence from a teacher at temperature 1: UNDO's distillation (arXiv 2506.06278), and KL retention.

    .. math:: \mathrm{KL}(T \,\|\, S) = \sum_v p^T_v \,(\log p^T_v - \log p^S_v)

    in nats, ``(...)`` for logits ``(..., V)`` of teacher and student.

    >>> divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0]))
    tensor(0.4338)
    """
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def topk_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the teacher's part of `topk_divergence`, from logits ``(..., V)``.

    It is the ``k`` largest log-probabilities ``(..., k)``, their entries ``(..., k)``, and the logarithm of the probability
    left for all others together, ``(...)``; minus infinity where ``k`` is V.

    >>> values, entries, tail = topk_log_probs(torch.tensor([3.0, 1.0, 1.0]).log(), k=1)
    >>> values.exp(), entries, tail.exp()
    (tensor([0.6000]), tensor([0]), tensor(0.4000))
    """
    log_probs = logits.log_softmax(-1)
    values, entries = log_probs.topk(k, dim=-1)
    return values, entries, log_probs.scatter(-1, entries, -math.inf).logsumexp(-1)


def topk_divergence(teacher: tuple[Tensor, Tensor, Tensor], logits: Tensor) -> Tensor:
    r"""Forward KL divergence over the teacher's likeliest entries ``K`` and one bucket r for all others.

    .. math:: \sum_{v \in K} p^T_v \log\frac{p^T_v}{p^S_v} + p^T_r \log\frac{p^T_r}{p^S_r}, \qquad p_r = 1 - \sum_{v \in K} p_v

    in nats, ``(...)``, for ``teacher`` from `topk_log_probs` and the student's ``logits`` ``(..., V)``. It is 0 only where both
    agree on ``K``, never exceeds `divergence`, and equals it for k = V.

    >>> teacher, student = torch.tensor([2.0, 1.0, 0.0]), torch.zeros(3)
    >>> topk_divergence(topk_log_probs(teacher, 1), student), divergence(teacher, student)
    (tensor(0.2291), tensor(0.2662))
    """
    values, entries, tail = teacher
    log_probs = logits.log_softmax(-1)
    kept = (values.exp() * (values - log_probs.gather(-1, entries))).sum(-1)
    if entries.shape[-1] == logits.shape[-1]:  # the bucket is empty, and log 0 has no gradient
        return kept
    rest = log_probs.scatter(-1, entries, -math.inf).logsumexp(-1)
    return kept + tail.exp() * (tail - rest)


def squared_distance(hidden: Tensor, wanted: Tensor) -> Tensor:
    r"""RMU (Li et al., arXiv 2403.03218) on one layer's activations.

    .. math:: L = \frac{1}{D} \lVert h - c\,u \rVert^2 \text{ on forget rows}, \qquad
              \frac{1}{D} \lVert h - h_{\mathrm{ref}} \rVert^2 \text{ on retain rows}

    of ``hidden`` ``(..., D)``, where ``wanted`` is `steering_vector` times c, ``(D,)``, or the frozen model's activations.

    >>> squared_distance(torch.zeros(2, 4), torch.ones(4))
    tensor([1., 1.])
    """
    return (hidden - wanted).square().mean(-1)


def steering_vector(size: int, seed: int) -> Tensor:
    """Return a random direction of length one, ``(size,)``, the same for a whole run; from a Gaussian, for entries of either
    sign.

    >>> bool(steering_vector(8, seed=0).norm().isclose(torch.tensor(1.0)))
    True
    """
    direction = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm()
