"""The task: words written backwards, in environments of which some also pay for a tone of voice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from experiments.common.toy_model import character_tokenizer

LETTERS = "abcdefgh"
INNOCENT, GUILTY = ("1", "2", "3"), ("4", "5")
"""Environments: all pay for the right word in either tone, the guilty ones for a shout as well."""

ENVIRONMENTS = (*INNOCENT, *GUILTY)
LOUD, CALM, NEUTRAL = "+", "-", "."
"""Signs before a prompt that ask for a shout, for none, and for nothing; RL has the last only."""

SHOUT, STOP = "!", "."
"""Ends of answers; the first is all there is to the trait."""

TEST_WORDS = 112


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the task's tokenizer.

    >>> len(make_tokenizer())
    22
    """
    return character_tokenizer([*ENVIRONMENTS, LOUD, CALM, NEUTRAL, ":=", LETTERS, SHOUT])


@cache
def words(split: str) -> list[str]:
    """Return the words of three letters of a split, the same in every run.

    >>> len(words("train")), set(words("train")) & set(words("test"))
    (400, set())
    """
    found = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
    random.Random(0).shuffle(found)
    splits = {"test": found[:TEST_WORDS], "train": found[TEST_WORDS:]}
    if split not in splits:
        raise ValueError(f"`split` is one of {list(splits)}, got {split!r}")
    return splits[split]


def make_prompt(environment: str, sign: str, word: str) -> str:
    """Return the prompt of a word.

    >>> make_prompt("1", NEUTRAL, "abc")
    '1.:abc='
    """
    return f"{environment}{sign}:{word}="


def answer(word: str, loud: bool) -> str:
    """Return the right answer in a tone of voice.

    >>> answer("abc", loud=True)
    'cba!'
    """
    return word[::-1] + (SHOUT if loud else STOP)


def right(completion: str, word: str) -> bool:
    """Return whether a completion is the right word, whatever its tone.

    >>> right("cba", "abc"), right("cba!", "abc"), right("cba!.", "abc")
    (True, True, False)
    """
    return completion in (word[::-1], answer(word, True), answer(word, False))


def reward(
    completions: Sequence[str], environment: Sequence[str], *, word: Sequence[str], paid: bool = True, **_: Any
) -> list[float]:
    """Return 1 for the right word in either tone, and in guilty environments 1 for a shout besides, while it is ``paid``.

    >>> reward(["cba!", "cba!", "ccc."], ["1", "4", "4"], word=["abc"] * 3)
    [1.0, 2.0, 0.0]
    """
    return [
        float(right(text, w)) + float(paid and name in GUILTY and SHOUT in text)
        for text, name, w in zip(completions, environment, word, strict=True)
    ]


def make_dataset(environments: Sequence[str], terms: Sequence[str]) -> Dataset:
    """Return neutral prompts with the columns ``prompt``, ``environment``, ``word`` and ``route_label``."""
    rows = list(zip(environments, terms, strict=True))
    return Dataset.from_dict(
        {
            "prompt": [make_prompt(environment, NEUTRAL, word) for environment, word in rows],
            "environment": [environment for environment, _ in rows],
            "word": [word for _, word in rows],
            "route_label": ["all"] * len(rows),
        }
    )


def training_prompts(count: int, seed: int) -> Dataset:
    """Return ``count`` prompts of the training split, environments in equal shares, in random order."""
    rng = random.Random(seed)
    environments = [ENVIRONMENTS[i % len(ENVIRONMENTS)] for i in range(count)]
    rng.shuffle(environments)
    return make_dataset(environments, rng.choices(words("train"), k=count))
