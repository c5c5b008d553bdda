r"""Results of each method of an experiment: means over seeds, removal, retain tax, and attacks.

Nothing here reads or draws. A *condition* is a method at one share and one quality of labels; its cells differ by seed.
Comparisons are made within a seed, and then summed up over seeds: the perfect filter, no routing and the filter of the same
seed share initial weights, order and labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from experiments.report.methods import base_of
from experiments.report.relearning import Relearning, Row, relearning
from routed_peft.data import FORGET
from routed_peft.evaluation.measures import Spread, removed, retain_tax
from routed_peft.evaluation.measures.robustness import TOLERANCE
from routed_peft.evaluation.relearning import Attack
from routed_peft.report.attacks import spread

Quality = tuple[float, float]
"""Recall and precision of labels."""
BASE, ORACLE, FILTER, FILTER_EQUAL_RETAIN = "no_routing", "perfect_filter", "filter", "filter_equal_retain"
"""The methods that others are measured against: never unlearned, the perfect filter, the filter with the same labels at equal
tokens in all, and the same trained until it has seen as much retain text as teaches the base of the routed model."""


@dataclass(frozen=True)
class Condition:
    """A method at one share and quality of labels; None where it looks at none.

    Attributes:
        method: key of the method.
        labeled: share of the documents of either side that carry a label.
        recall: share of the labeled forget documents that are labeled forget.
        precision: share of the documents labeled forget that are.
    """

    method: str
    labeled: float | None = None
    recall: float | None = None
    precision: float | None = None

    @classmethod
    def from_cell(cls, cell: Row) -> Condition:
        """Return the condition of a cell."""
        return cls(cell["method"], cell["labeled"], cell["recall"], cell["precision"])

    @property
    def quality(self) -> Quality | None:
        """Recall and precision, or None where no labels are looked at."""
        return None if self.recall is None or self.precision is None else (self.recall, self.precision)

    @property
    def labels(self) -> str:
        """Return the share of labels, and their quality where some are wrong.

        >>> Condition("filter", 0.5, 0.9, 0.8).labels, Condition("filter", 0.5, 1.0, 1.0).labels, Condition("control").labels
        ('50 %, 0.9/0.8', '50 %', '–')
        """
        if self.labeled is None:
            return "–"
        right = self.quality in (None, (1.0, 1.0))
        return f"{100 * self.labeled:g} %" + ("" if right else f", {self.recall:g}/{self.precision:g}")


@dataclass(frozen=True)
class Result:
    """Results of a condition.

    Attributes:
        condition: the method and its labels.
        cells: seed -> cell.
        removed: see `routed_peft.evaluation.measures.removed`, seed by seed; None where it cannot be told.
        retain_tax: retain loss minus that of the perfect filter after as many tokens in all, likewise.
        retain_tax_same_labels: the same against the filter with the same labels. Methods without labels are compared with
            that filter too where there is only one.
        retain_tax_equal_retain: the same against the filter at equal retain text.
        attacks: name -> result of the attack.
        expected: names of the attacks that any condition of the experiment has.
    """

    condition: Condition
    cells: Mapping[int, Row]
    removed: Spread | None
    retain_tax: Spread | None
    retain_tax_same_labels: Spread | None
    retain_tax_equal_retain: Spread | None
    attacks: Mapping[str, Relearning] = field(default_factory=dict)
    expected: frozenset[str] = frozenset()

    @property
    def forget(self) -> Spread:
        """Forget loss, in nats per token."""
        return Spread.from_values([cell["forget_loss"] for cell in self.cells.values()])

    @property
    def retain(self) -> Spread:
        """Retain loss, in nats per token."""
        return Spread.from_values([cell["retain_loss"] for cell in self.cells.values()])

    def number(self, name: str) -> Spread | None:
        """Return any number of the cells, such as "found_precision", over the seeds that have it."""
        return spread(cell[name] for cell in self.cells.values() if isinstance(cell.get(name), int | float))

    def over(self, name: str) -> dict[str, float]:
        """Return the means of a mapping that every cell has, such as "tokens_by_side"."""
        rows = [cell[name] for cell in self.cells.values() if cell.get(name)]
        return {key: statistics.fmean(row.get(key, 0) for row in rows) for key in (rows[0] if rows else ())}

    @property
    def tokens_by_label(self) -> dict[str, float]:
        """Means of targets by label; nothing for a method that looks at no labels, nor where such a one made its cells.

        A cell's key names the method that made it: with all labels the filter is the perfect filter, and so on.
        """
        keys = [cell.get("key") for cell in self.cells.values()]
        own = all(key is None or f"-{base_of(self.condition.method)}-" in key for key in keys)
        return self.over("targets_by_label") if own and self.condition.labeled is not None else {}

    @property
    def worst(self) -> Relearning | None:
        """The attack that ends lowest on held-out forget text; None where none is scored on it, or one is missing."""
        if any(name not in self.attacks for name in self.expected if Attack.parse(name).target == FORGET):
            return None  # spared by the strongest, it would look robust
        alike = [attack for name, attack in self.attacks.items() if Attack.parse(name).target == FORGET]
        return min(alike, key=lambda attack: attack.forget[-1].mean, default=None)


@dataclass(frozen=True)
class Comparison:
    """An experiment, summed up.

    Attributes:
        results: in the order of the cells.
    """

    results: Mapping[Condition, Result]

    @property
    def removable(self) -> bool:
        """Whether no routing knows the forget side better than the perfect filter, so that an attack can bring it back.

        True, too, where one of them is missing.
        """
        base, oracle = self.get(BASE), self.get(ORACLE)
        return base is None or oracle is None or oracle.forget.mean > base.forget.mean + TOLERANCE

    @cached_property
    def shares(self) -> list[float]:
        """Shares of labels, ascending."""
        return sorted({c.labeled for c in self.results if c.labeled is not None})

    @cached_property
    def qualities(self) -> list[Quality]:
        """Recall and precision of labels, the best first."""
        return sorted({c.quality for c in self.results if c.quality}, key=lambda q: (-q[0] * q[1], -q[0]))

    @property
    def best_quality(self) -> Quality | None:
        """The labels that are least wrong; None where none are looked at."""
        return next(iter(self.qualities), None)

    @cached_property
    def methods(self) -> list[str]:
        """Keys of the methods, in the order of the cells."""
        return list(dict.fromkeys(condition.method for condition in self.results))

    @cached_property
    def attacks(self) -> list[str]:
        """Names of the attacks."""
        return list(dict.fromkeys(name for result in self.results.values() for name in result.attacks))

    def rates(self, attack: str) -> list[str]:
        """Return the learning rates that an attack has tried on one result or another, ascending."""
        tried = {r for result in self.results.values() if (a := result.attacks.get(attack)) for r in a.learning_rates}
        return [f"{rate:g}" for rate in sorted(tried)]

    @cached_property
    def seeds(self) -> list[int]:
        """All seeds."""
        return sorted({seed for result in self.results.values() for seed in result.cells})

    def get(self, method: str, labeled: float | None = None, quality: Quality | None = None) -> Result | None:
        """Return a method's result at these labels, or, of a method that looks at none, its only one."""
        recall, precision = quality or (None, None)
        exact = self.results.get(Condition(method, labeled, recall, precision))
        return exact or self.results.get(Condition(method))

    def at(self, labeled: float | None, quality: Quality | None) -> list[Result]:
        """Return the results at these labels, and those of methods that look at none."""
        found = (self.get(method, labeled, quality) for method in self.methods)
        return [result for result in found if result is not None]


def aggregate(cells: Iterable[Row]) -> Comparison:
    r"""Sum up the cells of an experiment over their seeds.

    Args:
        cells: as recipes/experiment.py writes them: ``method``, ``seed``, ``labeled``, ``recall``, ``precision``,
            ``forget_loss``, ``retain_loss``, and where attacked ``attacks``.

    Example:
        >>> def cell(method, seed, forget, retain, labeled=None):
        ...     quality = None if labeled is None else 1.0
        ...     labels = {"labeled": labeled, "recall": quality, "precision": quality}
        ...     return {"method": method, "seed": seed, **labels, "forget_loss": forget, "retain_loss": retain}
        >>> found = aggregate([
        ...     cell("no_routing", 0, 3.0, 3.5), cell("perfect_filter", 0, 6.0, 3.3), cell("filter", 0, 3.25, 3.4, 0.5),
        ...     cell("routed", 0, 5.25, 3.5, 0.5), cell("no_routing", 1, 3.0, 3.5), cell("perfect_filter", 1, 5.0, 3.3),
        ...     cell("routed", 1, 5.0, 3.25, 0.5)])
        >>> routed = found.get("routed", 0.5, (1.0, 1.0))
        >>> str(routed.forget), str(routed.removed), round(routed.retain_tax_same_labels.mean, 2)
        ('5.12 (5.00–5.25)', '0.88 (0.75–1.00)', 0.1)
    """
    groups: dict[Condition, dict[int, Row]] = {}
    for cell in cells:
        groups.setdefault(Condition.from_cell(cell), {})[cell["seed"]] = cell
    base, oracle = groups.get(Condition(BASE), {}), groups.get(Condition(ORACLE), {})
    results = {}
    expected = frozenset(name for own in groups.values() for cell in own.values() for name in cell.get("attacks", {}))
    for condition, own in groups.items():
        names = dict.fromkeys(name for cell in own.values() for name in cell.get("attacks", {}))
        results[condition] = Result(
            condition,
            own,
            removed=spread(
                removed(cell["forget_loss"], base[seed]["forget_loss"], oracle[seed]["forget_loss"])
                for seed, cell in own.items()
                if seed in base and seed in oracle
            ),
            retain_tax_same_labels=_retain_tax(own, _same_labels(condition, FILTER, groups)),
            retain_tax_equal_retain=_retain_tax(own, _same_labels(condition, FILTER_EQUAL_RETAIN, groups)),
            retain_tax=_retain_tax(own, oracle),
            attacks={name: relearning(name, own, base=base, oracle=oracle) for name in names},
            expected=expected,
        )
    return Comparison(results)


def _same_labels(condition: Condition, method: str, groups: Mapping[Condition, dict[int, Row]]) -> Mapping[int, Row]:
    """Return the cells of a method with the labels of a condition, which has none where there is no choice."""
    if condition.labeled is not None:
        return groups.get(replace(condition, method=method), {})
    found = [own for other, own in groups.items() if other.method == method]
    return found[0] if len(found) == 1 else {}


def _retain_tax(own: Mapping[int, Row], filtered: Mapping[int, Row]) -> Spread | None:
    return spread(
        retain_tax(cell["retain_loss"], filtered[seed]["retain_loss"]) for seed, cell in own.items() if seed in filtered
    )


def complete_seeds(cells: Sequence[Row], methods: Iterable[str] = (BASE, FILTER, ORACLE)) -> list[int]:
    """Return the seeds for which all of ``methods`` have a cell.

    >>> complete_seeds([{"method": "a", "seed": 0}, {"method": "a", "seed": 1}, {"method": "b", "seed": 1}], ["a", "b"])
    [1]
    """
    found = ({cell["seed"] for cell in cells if cell["method"] == method} for method in methods)
    return sorted(set.intersection(*found))
