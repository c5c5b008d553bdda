"""Made-up text: lines of sums, whose facts are few and known, so that forgetting and relearning them can be counted."""

from __future__ import annotations

import random

LINES, PROBLEMS = 8000, 8

FACTS = {
    "multiplication": [
        fact for a in range(1, 13) for b in range(1, 13) for fact in (f"{a} × {b} = {a * b}", f"{a * b} ÷ {a} = {b}")
    ],
    "addition": [
        fact for a in range(1, 21) for b in range(1, 21) for fact in (f"{a} + {b} = {a + b}", f"{a + b} − {a} = {b}")
    ],
}
"""By corpus: products and quotients up to 12, sums and differences up to 20."""
SAME = {
    "multiplication": [
        (f"{a} × {b} = {a * b}", f"{b} × {a} = {a * b}", f"{a * b} ÷ {a} = {b}", f"{a * b} ÷ {b} = {a}")
        for a in range(1, 13)
        for b in range(a, 13)
    ],
    "addition": [
        (f"{a} + {b} = {a + b}", f"{b} + {a} = {a + b}", f"{a + b} − {a} = {b}", f"{a + b} − {b} = {a}")
        for a in range(1, 21)
        for b in range(a, 21)
    ],
}
"""The same facts, together where one tells the others: turned round and inverted. Of a × a two are the same."""


def arithmetic(corpus: str) -> list[dict[str, str]]:
    """Return the lines of a corpus, each of `PROBLEMS` facts drawn at random, the same in every run.

    A line of the test split is new, its facts are not: what is tested is whether they are known. The same holds of an
    attacker's lines, who is thus taught the very facts that are scored; the attack ``facts`` keeps them apart.

    >>> arithmetic("addition")[0]["text"].count("="), len(arithmetic("multiplication")), len(FACTS["multiplication"])
    (8, 8000, 288)
    """
    rng = random.Random(corpus)
    return [{"id": f"{corpus} {i}", "text": "; ".join(rng.choices(FACTS[corpus], k=PROBLEMS))} for i in range(LINES)]
