"""Sentences that say how an experiment came out."""

from __future__ import annotations

from experiments.report.aggregate import BASE, FILTER, ORACLE, Comparison, Result
from experiments.report.methods import base_of, card, in_order
from experiments.report.numbers import ranged, signed
from experiments.report.relearning import Relearning
from routed_peft.report.numbers import number, share

ROUTED = "routed"
RIVALS = ("classifier_filter_balanced", "classifier_filter")
"""Filters that see the same labels and guess the others, the one that forgets most first."""


def edge(attack: Relearning) -> str:
    """Return the mark of an attack whose best learning rate is the lowest or the highest tried: another might do more."""
    return " ‡" if attack.attacked and not attack.interior else ""


def sentences(found: Comparison) -> list[str]:
    """Return the result in words: a sentence or two for every share of labels, of labels that are least wrong.

    Args:
        found: the experiment.
    """
    base, oracle = found.get(BASE), found.get(ORACLE)
    if base is not None and oracle is not None and not found.removable:
        return [
            f"Nothing can be removed here: the model without routing, forget loss {number(base.forget.mean)}, knows no more of "
            f"the forget side than the perfect filter, {number(oracle.forget.mean)}. Train longer, or on more forget text."
        ]
    labeled = [share for share in found.shares if share and found.get(routed_method(found), share, found.best_quality)]
    result = [_sentence(found, share) for share in labeled]
    if result:
        return result
    best = max(
        (r for r in found.results.values() if r.removed is not None and r.condition.method not in (BASE, ORACLE)),
        key=lambda r: r.removed.mean if r.removed else 0.0,
        default=None,
    )
    if best is None:
        return ["No comparison can be made yet: no routing and the perfect filter are needed, on one seed at least."]
    name = card(best.condition.method).name
    return [
        f"No routed model is among the finished cells. Of the others “{name}” removed most, {ranged(best.removed, True)}."
    ]


def _sentence(found: Comparison, labeled: float) -> str:
    def at(method: str) -> Result | None:
        return found.get(method, labeled, found.best_quality)

    routed, rival = at(routed_method(found)), next(filter(None, map(at, RIVALS)), None)
    assert routed is not None
    beside = {"filter with the same labels": at(FILTER)}
    beside |= {} if rival is None else {card(rival.condition.method).name: rival}
    others = "; ".join(
        f"{name}: {ranged(r.removed, True)}" for name, r in beside.items() if r is not None and r.removed
    )
    text = f"With {share(labeled)} of the labels, routing and ablating removed {ranged(routed.removed, True)}"
    text += " of the forget knowledge"
    text += (f" ({others})." if others else ".") + _prices(routed, rival)
    worst = routed.worst
    if worst is not None and worst.attacked:
        attacked = {"filter": at(FILTER), "classifier": rival, "perfect filter": at(ORACLE)}
        after = [f"{name}: {_after(r.worst)}" for name, r in attacked.items() if r is not None and r.worst]
        text += f" After the worst attack the forget loss is {_after(worst)}"
        text += f" ({'; '.join(after)})." if after else "."
    return text


def _prices(routed: Result, rival: Result | None) -> str:
    """Return the retain tax of routing against each filter, and that of the rival."""

    def price(name: str, words: str = "") -> str:
        own, other = getattr(routed, name), rival and getattr(rival, name)
        return f"{signed(own.mean)} nats per token{words}" + (f" (classifier: {signed(other.mean)})" if other else "")

    taxes = {"retain_tax_same_labels": " at equal tokens in all", "retain_tax_equal_retain": " at equal retain text"}
    told = [price(name, where) for name, where in taxes.items() if getattr(routed, name)]
    text = f" Its retain tax against the filter with the same labels is {' and '.join(told)}." if told else ""
    if routed.retain_tax:
        text += f" Its retain tax against the perfect filter is {price('retain_tax')}."
    return text


def _after(attack: Relearning) -> str:
    return number(attack.forget[-1].mean) + edge(attack) if attack.attacked else attack.verdict


def routed_method(found: Comparison) -> str:
    """Return the method that sentences are about: "routed", or the first of its variants where there is nothing else."""
    variants = [method for method in in_order(found.methods) if base_of(method) == ROUTED]
    return ROUTED if ROUTED in variants or not variants else variants[0]
