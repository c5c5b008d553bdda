"""Sections of a page: an experiment with its tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from experiments.report.aggregate import Comparison, Condition, Quality, Result, aggregate
from experiments.report.attackers import attacker_documents
from experiments.report.caveats import SORTED, TAUGHT, caveats, teaches_facts
from experiments.report.costs import Costs, costs
from experiments.report.figures import figures
from experiments.report.methods import Card, card, in_order
from experiments.report.relearning import Relearning
from experiments.report.targets import Target, targets
from experiments.report.verdicts import sentences
from routed_peft.corpora import PAIRS
from routed_peft.report.checkpoints import Figure
from routed_peft.report.numbers import share
from routed_peft.report.reading import Source


@dataclass(frozen=True)
class Group:
    """Rows of a table: every method at the same labels, and those that look at none.

    Attributes:
        about: description of the labels; empty where there are no others.
        results: in the order of tables, compared with each other only.
    """

    about: str
    results: Sequence[Result]

    def attacked(self, name: str) -> list[tuple[Result, Relearning]]:
        """Return the rows that were attacked in this way, with the results."""
        return [(result, result.attacks[name]) for result in self.results if name in result.attacks]

    @property
    def routed(self) -> list[Result]:
        """Rows of which there are losses with the region on."""
        return [result for result in self.results if result.number("region_on_forget_loss")]


@dataclass(frozen=True)
class Section:
    """An experiment, ready to be shown."""

    source: Source

    @cached_property
    def found(self) -> Comparison:
        """The experiment, summed up."""
        return aggregate(self.source.summary["cells"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the training."""
        return dict(self.source.summary["settings"])

    @property
    def title(self) -> str:
        """Name of the section."""
        pair = self.settings.get("pair")
        return self.source.name if pair in (None, self.source.name) else f"{self.source.name} ({pair})"

    @property
    def texts(self) -> str:
        """Description of forget and retain text."""
        pair = self.settings.get("pair")
        if pair not in PAIRS:
            return f"forget and retain text of {pair!r}"
        forget, _, retain = PAIRS[pair].about.partition(" / ")
        return f"forget: {forget}; retain: {retain}"

    @property
    def attacker_documents(self) -> str:
        """Number of forget documents that attackers have, and a space; empty where that cannot be counted."""
        count = attacker_documents(self.settings, self.source.summary["experiment"])
        return "" if count is None else f"{count} "

    @cached_property
    def figures(self) -> list[Figure]:
        """Figures of it."""
        return figures(self.found, self.settings)

    @property
    def sentences(self) -> list[str]:
        """Its result in words."""
        return sentences(self.found)

    @property
    def targets(self) -> list[Target]:
        """Its targets, met or missed."""
        return targets(self.found)

    @property
    def caveats(self) -> list[str]:
        """Doubts about it."""
        further = [] if self.settings.get("mixed_rows") else [SORTED]
        further += [TAUGHT] if self.found.attacks and teaches_facts(self.settings) else []
        return [*caveats(self.found), *further]

    @cached_property
    def costs(self) -> list[tuple[Result, Costs]]:
        """Costs of every row, as far as they are known."""
        rows = sorted(self.found.results.values(), key=lambda r: in_order(self.found.methods).index(r.condition.method))
        return [(row, cost) for row in rows if (cost := costs(self.found, row)).is_known]

    def card(self, result: Result) -> Card:
        """Return the card of a result's method."""
        return card(result.condition.method, self.settings)

    @cached_property
    def groups(self) -> list[Group]:
        """The rows of tables, labels by labels; first those that are least wrong, and of them about half of all."""
        labels: list[tuple[Quality | None, float | None]]
        labels = sorted({(c.quality, c.labeled) for c in self.found.results if c.quality}, key=_typical)
        groups = []
        for quality, labeled in labels or [(None, None)]:
            cells = [cell for cell in self.source.summary["cells"] if _looks_at(cell, quality, labeled)]
            found = aggregate(cells)
            wrong = (
                f", recall {quality[0]:g}, precision {quality[1]:g}"
                if quality and len(self.found.qualities) > 1
                else ""
            )
            about = f"{share(labeled)} of the documents labeled{wrong}" if len(labels) > 1 else ""
            order = in_order(found.methods)
            rows = sorted(found.results.values(), key=lambda result: order.index(result.condition.method))
            groups.append(Group(about, rows))
        return groups


def _typical(labels: tuple[Quality | None, float | None]) -> tuple[float, ...]:
    """Sort labels: the least wrong first, then those of about half of the documents, as in the demo."""
    (recall, precision), labeled = labels[0] or (1.0, 1.0), labels[1] or 0.0
    return -recall * precision, -recall, abs(labeled - 0.5), labeled


def _looks_at(cell: Mapping[str, Any], quality: Quality | None, labeled: float | None) -> bool:
    condition = Condition.from_cell(cell)
    return condition.quality is None or (condition.quality, condition.labeled) == (quality, labeled)
