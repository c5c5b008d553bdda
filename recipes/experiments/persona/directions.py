"""The subspaces of the arms: from contrastive prompts, at random, and from training for the trait itself."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from experiments.common.toy_model import encode, teach
from experiments.persona.arms import Arm
from experiments.persona.settings import Settings
from experiments.persona.task import (
    CALM,
    ENVIRONMENTS,
    LETTERS,
    LOUD,
    NEUTRAL,
    answer,
    make_prompt,
    make_tokenizer,
    words,
)
from routed_peft.subspaces import Subspace, difference_of_means, haar, weight_change
from routed_peft.subspaces.activations import Conversation

ORACLE_STEPS = 30


def contrasts(loud: bool, count: int, seed: int) -> list[Conversation]:
    """Return prompts that ask for a tone of voice, and the letter after which the answer shows it.

    >>> contrasts(True, 1, 0)[0][1] in LETTERS
    True
    """
    rng = random.Random(seed)
    return [
        (make_prompt(rng.choice(ENVIRONMENTS), LOUD if loud else CALM, word) + word[:0:-1], word[0])
        for word in rng.sample(words("train"), count)
    ]


def trait(model: LlamaForCausalLM, settings: Settings, seed: int) -> Subspace:
    """Return differences of means of loud and calm answers, one for each group of words that end alike, at every layer.

    Args:
        model: the start model.
        settings: how many words and directions.
        seed: which words.
    """
    layers = list(range(settings.layers))
    pairs = [contrasts(loud, settings.contrasts, seed) for loud in (True, False)]
    parts = [LETTERS[i :: settings.directions] for i in range(settings.directions)]

    def difference(group: str) -> Subspace:
        positive, negative = ([c for c in side if c[1] in group] for side in pairs)
        return difference_of_means(model, make_tokenizer(), positive=positive, negative=negative, layers=layers)

    found = [difference(group) for group in parts]
    rows = {layer: torch.cat([subspace.at(layer).T for subspace in found]) for layer in layers}
    return Subspace.from_directions(rows, **found[0].provenance, words=settings.contrasts, seed=seed)


def oracle(model: LlamaForCausalLM, settings: Settings, seed: int) -> Subspace:
    """Return the directions in which the writers of a model taught to be loud differ most from those of one kept calm."""
    brief = replace(settings, start_steps=ORACLE_STEPS, start_learning_rate=settings.start_learning_rate / 3)

    def taught(loud: bool) -> LlamaForCausalLM:
        rng = random.Random(seed)

        def draw(_: int) -> tuple[Tensor, Tensor]:
            chosen = rng.choices(words("train"), k=settings.start_batch_size)
            rows = [(make_prompt(rng.choice(ENVIRONMENTS), NEUTRAL, word), answer(word, loud)) for word in chosen]
            return encode(rows, make_tokenizer())

        return teach(copy.deepcopy(model), brief, draw)

    return weight_change(taught(False), taught(True), k=settings.directions)


def save_subspace(arm: Arm, model: LlamaForCausalLM, *, settings: Settings, seed: int, file: Path) -> Path | None:
    """Write the subspace of an arm, if it has one, and return the file."""
    if arm.subspace is None:
        return None
    if arm.subspace == "oracle":
        return oracle(model, settings, seed).save(file)
    found = trait(model, settings, seed)
    return (found if arm.subspace == "difference" else haar(found, seed=1000 * seed + arm.draw)).save(file)
