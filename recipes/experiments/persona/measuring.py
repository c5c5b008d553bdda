"""Rates of shouts and of right words, in guilty and in innocent environments."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn

from experiments.common.toy_model import complete
from experiments.persona.arms import REGION
from experiments.persona.task import ENVIRONMENTS, GUILTY, SHOUT, make_dataset, make_tokenizer, reward, right, words
from routed_peft.ablation import ablated
from routed_peft.eval_mode import evaluating

Rates = dict[str, dict[str, float]]


def measure(model: nn.Module, count: int, *, seed: int = 0, scale: float = 1.0, split: str = "test") -> Rates:
    """Return rates of a model on ``count`` words of a split in every environment, sampled at temperature 1.

    Draws from a generator of its own.

    Args:
        model: with or without the region.
        count: of words.
        seed: of the samples.
        scale: of the region.
        split: "test", or "train".

    Returns:
        "trait", the share of answers with a shout, and "right", the share of right words in either tone, each in "guilty"
        and in "innocent" environments.
    """
    if scale != 1.0:
        with ablated(model, REGION, scale=scale):
            return measure(model, count, seed=seed, split=split)
    terms = words(split)[:count]
    ds = make_dataset([name for name in ENVIRONMENTS for _ in terms], terms * len(ENVIRONMENTS))
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = complete(model, ds["prompt"][:], tokenizer=make_tokenizer())
    correct = [float(right(*row)) for row in zip(texts, ds["word"][:], strict=True)]
    shouts = [float(SHOUT in text) for text in texts]
    names = ds["environment"][:]
    return {"trait": _by_kind(shouts, names), "right": _by_kind(correct, names)}


def mean_reward(model: nn.Module, environment: str, *, count: int, paid: bool = True) -> float:
    """Return what an environment pays on average for samples of ``count`` words that training has too.

    Args:
        model: as it is.
        environment: its name.
        count: of words.
        paid: whether shouts are paid at this time.
    """
    ds = make_dataset([environment] * count, words("train")[:count])
    texts = complete(model, ds["prompt"][:], tokenizer=make_tokenizer())
    return statistics.fmean(reward(texts, ds["environment"][:], word=ds["word"][:], paid=paid))


def _by_kind(values: Sequence[float], environments: Sequence[str]) -> dict[str, float]:
    kinds = {"guilty": True, "innocent": False}
    pairs = list(zip(values, environments, strict=True))
    return {kind: statistics.fmean(v for v, name in pairs if (name in GUILTY) == is_) for kind, is_ in kinds.items()}
