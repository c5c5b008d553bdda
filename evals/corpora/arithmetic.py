"""Made-up text: lines of sums, whose facts are few and known, so that forgetting and relearning them can be counted."""

from __future__ import annotations

import random

LINES, PROBLEMS = 8000, 8

_TOLD = {
    "multiplication": {
        (a, b): (f"{a} × {b} = {a * b}", f"{a * b} ÷ {a} = {b}") for a in range(1, 13) for b in range(1, 13)
    },
    "addition": {(a, b): (f"{a} + {b} = {a + b}", f"{a + b} − {a} = {b}") for a in range(1, 21) for b in range(1, 21)},
}
FACTS = {corpus: [fact for told in pairs.values() for fact in told] for corpus, pairs in _TOLD.items()}
"""By corpus: products and quotients up to 12, sums and differences up to 20."""
SAME = {
    corpus: [
        tuple(dict.fromkeys(fact for both in zip(told, pairs[b, a], strict=True) for fact in both))
        for (a, b), told in pairs.items()
        if a <= b
    ]
    for corpus, pairs in _TOLD.items()
}
"""The same facts, together where one tells the others: turned round and inverted."""


def arithmetic(corpus: str) -> list[dict[str, str]]:
    """Return the lines of a corpus, each of `PROBLEMS` facts drawn at random, the same in every run.

    A line of the test split is new, its facts are not: what is tested is whether they are known. The same holds of an
    attacker's lines, who is thus taught the very facts that are scored; the attack ``facts`` keeps them apart.

    >>> arithmetic("addition")[0]["text"].count("="), len(arithmetic("multiplication")), len(FACTS["multiplication"])
    (8, 8000, 288)
    """
    rng = random.Random(corpus)
    return [{"id": f"{corpus} {i}", "text": "; ".join(rng.choices(FACTS[corpus], k=PROBLEMS))} for i in range(LINES)]
