"""Doubts about an experiment that its own numbers tell of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.report.aggregate import BASE, FILTER, ORACLE, Comparison
from experiments.report.methods import card
from experiments.report.targets import SEEDS
from routed_peft.corpora import PAIRS
from routed_peft.corpora.arithmetic import FACTS
from routed_peft.report.numbers import number

SORTED = (
    "Rows hold documents of one side, those without a label too, as a page of a longer text would. Methods that judge rows are "
    "spared rows that mix sides; those that judge documents gain nothing by it."
)
TAUGHT = (
    "Lines of the attacker are new, their facts are not: the facts that are scored are among them. That an attack brings "
    "them back may be learning anew, as with the perfect filter; the attack “facts” trains on half and scores the other half."
)
"""Of pairs that `teaches_facts`."""
_BESIDE = {BASE: "no routing", ORACLE: "the perfect filter", FILTER: "the filter with the same labels"}
_FAMILIES = {"placebo": "a placebo", "output": "an output-based method"}


def teaches_facts(settings: Mapping[str, Any]) -> bool:
    """Return whether the forget text states single facts, which an attacker's lines share with those that are scored.

    >>> teaches_facts({"pair": "arithmetic"}), teaches_facts({"pair": "biology"}), teaches_facts({})
    (True, False, False)
    """
    return settings.get("pair") in PAIRS and PAIRS[settings["pair"]].forget in FACTS


def caveats(found: Comparison) -> Iterator[str]:
    """Yield the doubts about an experiment: seeds, methods and attacks that are missing, attacks that were none."""
    counts = [len(result.cells) for result in found.results.values()]
    most = max(counts)
    if most < SEEDS:
        yield f"No row rests on more than {most} seed{'s' if most > 1 else ''}; a claim needs {SEEDS}."
    elif few := sum(count < most for count in counts):
        yield f"The sweep is not complete: {few} of {len(counts)} rows have fewer seeds than the others."
    families = {card(method).family for method in found.methods}
    missing = [name for method, name in _BESIDE.items() if method not in found.methods]
    missing += [name for family, name in _FAMILIES.items() if family not in families]
    if missing:
        yield f"Such a result needs other methods beside it; missing: {', '.join(missing)}."
    spread = [
        f"a {side} loss by up to {number(half)}"
        for side in ("forget", "retain")
        if (half := _of_documents(found, side))
    ]
    if spread:
        yield (
            f"Ranges are those of seeds. Other test documents of the same kind would move {' and '.join(spread)} nats (95 of "
            "100 bootstrap draws); all rows are measured on the same ones."
        )
    yield from _of_attacks(found)


def _of_documents(found: Comparison, side: str) -> float:
    """Return the widest half of an interval over documents, in nats per token, where cells have them."""
    ends = (c.get(f"{side}_loss_interval") for result in found.results.values() for c in result.cells.values())
    return max(((high - low) / 2 for low, high in filter(None, ends)), default=0.0)


def _of_attacks(found: Comparison) -> Iterator[str]:
    if not found.attacks:
        yield "Nothing was attacked: these numbers do not tell whether the knowledge is really gone."
        return
    attacks = [attack for result in found.results.values() for attack in result.attacks.values()]
    whole = [attack for attack in attacks if attack.verdict == "attack"]
    if len(whole) < len(attacks):
        yield (
            f"{len(attacks) - len(whole)} of {len(attacks)} attacks lowered no loss, or diverged, in some seed. They are "
            "marked, and say nothing of robustness."
        )
    if edges := sum(not attack.interior for attack in whole):
        yield (
            f"In {edges} of {len(whole)} attacks the best learning rate lies at the edge of those tried (‡): another might "
            "bring back more."
        )
    if left := sum(len(result.attacks) < len(found.attacks) for result in found.results.values()):
        yield f"{left} of {len(found.results)} rows are not attacked in every way yet."
