"""UNDO's noise: every parameter moves part of the way to its initialization."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel


def shrink_perturb(parameter: Tensor, init_mean: Tensor, *, init_noise: Tensor, alpha: float, beta: float) -> Tensor:
    r"""Shrink a parameter towards the mean of its initialization, and add some of that initialization's noise.

    .. math:: \theta' = (1 - \alpha)\,\theta + \alpha\,(\mu + \beta\, n)

    This is the noise step of UNDO (arXiv 2506.06278), except that UNDO sets :math:`\mu = 0`. Here :math:`\mu` is the mean of
    the parameter's initialization: 1 for the weights of norms, which would otherwise scale activations by :math:`1 - \alpha`,
    unless they compute :math:`1 + w`; 0 for all else. All tensors have the parameter's shape; it is computed in float32 at
    least. With ``alpha`` and ``beta`` 1 it is a fresh initialization.

    >>> shrink_perturb(torch.tensor([2.0]), torch.tensor([1.0]), init_noise=torch.tensor([0.5]), alpha=0.5, beta=1.0)
    tensor([1.7500])
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value}")
    wide = torch.promote_types(parameter.dtype, torch.float32)
    start = init_mean.to(wide) + beta * init_noise.to(wide)
    return ((1 - alpha) * parameter.to(wide) + alpha * start).to(parameter.dtype)


@torch.no_grad()
def add_noise(model: PreTrainedModel, alpha: float, *, beta: float, seed: int = 0) -> None:
    """Apply `shrink_perturb` to every parameter of ``model``, in place; tied weights once, buffers not at all.

    The global random state is neither read nor changed. A model that does not match its configuration is a ValueError.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> add_noise(model, alpha=1.0, beta=0.0)
    >>> model.model.norm.weight.unique(), model.lm_head.weight.unique()
    (tensor([1.], grad_fn=...), tensor([0.], grad_fn=...))
    """
    parameters = dict(model.named_parameters())
    for name, *fresh in initialization(model, seed):
        mean, noise = (part.to(parameters[name].device) for part in fresh)
        parameters[name].copy_(shrink_perturb(parameters[name], mean, init_noise=noise, alpha=alpha, beta=beta))


def initialization(model: PreTrainedModel, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    r"""Yield the name, the mean :math:`\mu` and the noise :math:`n` of every parameter of a fresh model of this configuration.

    Entries that agree in models of different seeds are constants, without noise. The mean of other matrices is 0, as in every
    common scheme, and that of a vector is estimated from its entries. Mean and noise add up to the first model, but for
    rounding.
    """
    first, second = (dict(_fresh(model, each).named_parameters()) for each in (seed, seed + 1))
    own, fresh = ({name: p.shape for name, p in each.items()} for each in (dict(model.named_parameters()), first))
    if odd := sorted(name for name in own.keys() | fresh.keys() if own.get(name) != fresh.get(name)):
        problem = f"{type(model).__name__} and its configuration have different parameters, such as {odd[0]!r}"
        raise ValueError(f"{problem}, and noise needs the initialization of each: ablate or merge adapters first, and keep "
                         "the model's own configuration")  # fmt: skip
    for name, parameter in first.items():
        value, other = parameter.detach(), second[name].detach()
        middle = torch.stack([value, other]).mean() if value.dim() < 2 else torch.zeros(())
        mean = torch.where(value == other, value, middle.to(value))
        yield name, mean, value - mean


def _fresh(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a new model of the configuration of ``model``, in float32 on the CPU, that depends on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return type(model)(copy.deepcopy(model.config))
