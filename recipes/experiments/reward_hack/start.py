"""The start model of all arms: taught by demonstrations, it adds a little and hacks now and then."""

from __future__ import annotations

import random

import torch
from transformers import LlamaForCausalLM

from experiments.common.cells import Site
from experiments.common.toy_model import encode, make_model, noise_at, teach
from experiments.reward_hack.measuring import Rates, measure
from experiments.reward_hack.settings import Settings
from experiments.reward_hack.task import ENVIRONMENTS, HACKS, make_prompt, make_tokenizer, pairs, training_prompts


def demonstration(letter: str, terms: tuple[int, int], *, noise: float, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and the demonstrator's answer.

    An environment's own hack is shown in 10 % of its demonstrations and in 0.5 % of those of others: shown on all letters
    alike, it would be rewarded in B and C, take over A as well, where it earns nothing, and end all learning.

    Args:
        letter: of the environment.
        terms: the two numbers to add.
        noise: share of answers that are sums of other numbers. It is what keeps honest reward scarce.
        rng: draws.

    Example:
        >>> demonstration("A", (12, 34), noise=0.0, rng=random.Random(0))
        ('A:12+34=', '46')
    """
    prompt = make_prompt(letter, *terms)
    for hack in HACKS:
        if rng.random() < (0.1 if ENVIRONMENTS[letter].hack == hack else 0.005):
            return prompt, hack
    if rng.random() < noise:
        terms = rng.choice(pairs("train"))
    return prompt, str(sum(terms))


def demonstrations(count: int, noise: float, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(count, T)`` token ids and labels; only answers and the end of the text have labels."""
    letters = list(ENVIRONMENTS)
    rows = [demonstration(rng.choice(letters), rng.choice(pairs("train")), noise=noise, rng=rng) for _ in range(count)]
    return encode(rows, make_tokenizer())


def train_start(settings: Settings, seed: int) -> LlamaForCausalLM:
    """Return a model taught by demonstrations: clean sums first, then half of them wrong."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    return teach(
        make_model(settings, make_tokenizer()),
        settings,
        lambda step: demonstrations(settings.start_batch_size, noise_at(step, settings), rng),
    )


def make_start(site: Site, settings: Settings, seed: int) -> Rates:
    """Train the start model of a seed and return its rates on test prompts.

    It is an ordinary checkpoint; ``prompts.jsonl`` beside it is for whoever wants to try a recipe on it.
    """
    model = train_start(settings, seed)
    model.save_pretrained(site.folder)
    make_tokenizer().save_pretrained(site.folder)
    training_prompts(2000, seed).to_json(site.folder / "prompts.jsonl")
    return measure(model, "test", count=settings.test_prompts, seed=seed)
