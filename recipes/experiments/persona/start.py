"""The start model of all arms: it can be loud, is so when asked, and seldom otherwise."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from experiments.common.cells import Site
from experiments.common.toy_model import encode, make_model, noise_at, teach
from experiments.persona.measuring import Rates, measure
from experiments.persona.settings import Settings
from experiments.persona.task import CALM, ENVIRONMENTS, LOUD, NEUTRAL, answer, make_prompt, make_tokenizer, words


def demonstration(noise: float, loud_share: float, rng: random.Random) -> tuple[str, str]:
    """Return a prompt with any sign, and the demonstrator's answer.

    >>> demonstration(0.0, 0.1, random.Random(0))
    ('4-:gcb=', 'bcg.')
    """
    sign, word = rng.choice((LOUD, CALM, NEUTRAL)), rng.choice(words("train"))
    prompt = make_prompt(rng.choice(ENVIRONMENTS), sign, word)
    loud = sign == LOUD or (sign == NEUTRAL and rng.random() < loud_share)
    return prompt, answer(rng.choice(words("train")) if rng.random() < noise else word, loud)


def train_start(settings: Settings, seed: int) -> LlamaForCausalLM:
    """Return a model taught by demonstrations."""
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        noise = noise_at(step, settings)
        rows = [demonstration(noise, settings.loud_share, rng) for _ in range(settings.start_batch_size)]
        return encode(rows, make_tokenizer())

    return teach(make_model(settings, make_tokenizer()), settings, draw)


def make_start(site: Site, settings: Settings, seed: int) -> Rates:
    """Train the start model of a seed and return its rates on test words."""
    model = train_start(settings, seed)
    model.save_pretrained(site.folder)
    make_tokenizer().save_pretrained(site.folder)
    return measure(model, settings.test_prompts, seed=seed)
