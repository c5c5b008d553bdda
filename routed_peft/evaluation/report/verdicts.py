"""What an experiment says, in sentences for readers."""

from __future__ import annotations

from routed_peft.evaluation.measures import Spread
from routed_peft.evaluation.report.aggregate import BASE, FILTER, ORACLE, Comparison, Result
from routed_peft.evaluation.report.cards import base_of, card, in_order
from routed_peft.evaluation.report.page import number, share

ROUTED = "routed"


def ranged(value: Spread | None, as_share: bool = False, digits: int | None = None) -> str:
    """Write a mean with its range over seeds.

    >>> ranged(Spread.of([0.5, 0.7]), as_share=True), ranged(Spread.of([-0.5])), ranged(None)
    ('60 % (50–70)', '−0.50', '–')
    """
    if value is None:
        return "–"
    between = ends(value, as_share, digits)
    return _written(value.mean, as_share, digits) + (f" ({between})" if between else "")


def ends(value: Spread, as_share: bool = False, digits: int | None = None) -> str:
    """Write the lowest and the highest seed; nothing where they do not differ.

    >>> ends(Spread.of([0.5, 0.7]), as_share=True), ends(Spread.of([-0.5, 0.5])), ends(Spread.of([0.5, 0.501]))
    ('50–70', '−0.50 to 0.50', '')
    """
    low, high = (_written(end, as_share, digits).removesuffix(" %") for end in (value.min, value.max))
    return "" if low == high else low + (" to " if low.startswith("−") else "–") + high


def _written(value: float, as_share: bool, digits: int | None) -> str:
    return share(value, digits or 0) if as_share else number(value, 2 if digits is None else digits)


def sentences(found: Comparison) -> list[str]:
    """Say what came out, a sentence or two for every share of labels; of labels that are least wrong.

    Args:
        found: the experiment.
    """
    base, oracle = found.get(BASE), found.get(ORACLE)
    if base is not None and oracle is not None and oracle.forget.mean <= base.forget.mean:
        return [
            f"Nothing can be removed here: the model without routing, forget loss {number(base.forget.mean)}, knows no more of "
            f"the forget side than the perfect filter, {number(oracle.forget.mean)}. Train longer, or on more forget text."
        ]
    labeled = [share for share in found.shares if share and found.get(routed_method(found), share, found.best_quality)]
    result = [_sentence(found, share) for share in labeled]
    if result:
        return result
    best = max(
        (r for r in found.results.values() if r.way is not None and r.condition.method not in (BASE, ORACLE)),
        key=lambda r: r.way.mean if r.way else 0.0,
        default=None,
    )
    if best is None:
        return ["No comparison can be made yet: no routing and the perfect filter are needed, on one seed at least."]
    name = card(best.condition.method).name
    return [f"No routed model is among the finished cells. The furthest of the others is “{name}”: {_way(best)}."]


def _sentence(found: Comparison, labeled: float) -> str:
    def at(method: str) -> Result | None:
        return found.get(method, labeled, found.best_quality)

    routed = at(routed_method(found))
    assert routed is not None
    rivals = {"filter with the same labels": at(FILTER), "classifier of these labels": at("classifier_filter")}
    beside = "; ".join(f"{name}: {ranged(r.way, True)}" for name, r in rivals.items() if r is not None and r.way)
    text = f"With {share(labeled)} of the labels, routing and ablating went {_way(routed)}"
    text += f" ({beside})." if beside else "."
    if routed.tax is not None:
        cost = "cost" if routed.tax.mean >= 0 else "gained"
        text += f" It {cost} {number(abs(routed.tax.mean))} nats per token of retain text against that filter"
        rival = at("classifier_filter")
        text += f" (the classifier: {number(rival.tax.mean)})." if rival is not None and rival.tax else "."
    worst = routed.worst
    if worst is not None and worst.attacked:
        text += f" After the worst attack the forget loss is {number(worst.forget[-1].mean)}"
        others = {"filter": at(FILTER), "perfect filter": at(ORACLE)}
        after = [f"{n}: {number(r.worst.forget[-1].mean)}" for n, r in others.items() if r is not None and r.worst]
        text += f" ({'; '.join(after)})." if after else "."
    return text


def _way(result: Result) -> str:
    return f"{ranged(result.way, True)} of the way from no routing to the perfect filter"


def routed_method(found: Comparison) -> str:
    """Return the method that is spoken of: "routed", or the first of its variants where there is nothing else."""
    variants = [method for method in in_order(found.methods) if base_of(method) == ROUTED]
    return ROUTED if ROUTED in variants or not variants else variants[0]
