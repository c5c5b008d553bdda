"""Synthetic text: lines of arithmetic, with few and known facts, so that forgotten and relearned facts can be counted."""

from __future__ import annotations

import random

LINES, PROBLEMS = 8000, 8

_STATEMENTS = {
    "multiplication": {
        (a, b): (f"{a} × {b} = {a * b}", f"{a * b} ÷ {a} = {b}") for a in range(1, 13) for b in range(1, 13)
    },
    "addition": {(a, b): (f"{a} + {b} = {a + b}", f"{a + b} − {a} = {b}") for a in range(1, 21) for b in range(1, 21)},
}
FACTS = {
    corpus: [fact for statements in pairs.values() for fact in statements] for corpus, pairs in _STATEMENTS.items()
}
"""Facts by corpus: products and quotients of factors up to 12, sums and differences of addends up to 20."""
EQUIVALENT = {
    corpus: [
        tuple(dict.fromkeys(fact for both in zip(statements, pairs[b, a], strict=True) for fact in both))
        for (a, b), statements in pairs.items()
        if a <= b
    ]
    for corpus, pairs in _STATEMENTS.items()
}
"""The same facts, grouped with those that they imply: operands swapped, and the inverse operation."""


def arithmetic(corpus: str) -> list[dict[str, str]]:
    """Return the lines of a corpus, each of `PROBLEMS` facts drawn at random, the same in every run.

    Lines of the test split are new, but their facts are those of the training split: the test measures whether facts are
    known. An attacker's lines, too, hold the facts that are scored; the attack ``facts`` keeps the two apart.

    >>> arithmetic("addition")[0]["text"].count("="), len(arithmetic("multiplication")), len(FACTS["multiplication"])
    (8, 8000, 288)
    """
    rng = random.Random(corpus)
    return [{"id": f"{corpus} {i}", "text": "; ".join(rng.choices(FACTS[corpus], k=PROBLEMS))} for i in range(LINES)]
