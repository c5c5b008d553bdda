"""Numbers of one observation, for the log and the alarms, and their sums over a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from routed_peft.monitoring.growth import Growth
from routed_peft.monitoring.probe import Effect


@dataclass(frozen=True)
class RegionReport:
    """Measurements of one region of L layers at one step, in E environments."""

    layers: Sequence[str]
    environments: Sequence[str]
    growth: Growth
    effect: Effect  # after the step
    extra: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # name -> environment -> number
    weight_drift: float | None = None  # of the base along the region's subspace, if it has one

    @property
    def contributions(self) -> dict[str, float]:
        """Signed contribution to the step's growth, by environment."""
        return dict(zip(self.environments, self.growth.contributions.sum(0).tolist(), strict=True))

    def _by_environment(self) -> dict[str, Mapping[str, float]]:
        tensors = {"functional_size": self.effect.overall, "kl": self.effect.kl}
        tensors = {"raw_contribution": self.growth.raw.sum(0), **tensors}
        measured = {name: self._named(values) for name, values in tensors.items()}
        return {"contribution": self.contributions, **measured, **self.extra}

    def alarm_metrics(self, exempt: Collection[str] = ()) -> dict[str, float]:
        """Return the measured metrics for alarms, without the parts of ``exempt`` environments."""
        drift = {} if self.weight_drift is None else {"weight_drift": self.weight_drift}
        growth = self.growth.growth - sum(v for name, v in self.contributions.items() if name in exempt)
        found, measured = {"growth": growth, **drift}, self._by_environment()
        for metric in ("raw_contribution", "functional_size", "kl", "reward_gap"):
            if counted := [v for name, v in measured.get(metric, {}).items() if name not in exempt]:
                found[metric] = max(counted)
        return found

    def flatten(self, by_layer: bool) -> dict[str, float]:
        """Return all numbers under names such as ``kl/ENVIRONMENT``; with ``by_layer`` those of every layer too."""
        g, e = self.growth, self.effect
        numbers = {"size": g.size, "growth": g.growth, "rest": g.rest, "weight_drift": self.weight_drift}
        numbers["captured"] = g.captured
        found = {name: value for name, value in numbers.items() if value is not None and not math.isnan(value)}
        for name, values in self._by_environment().items():
            found |= {f"{name}/{environment}": value for environment, value in values.items()}
        for i, layer in enumerate(self.layers if by_layer else ()):
            found[f"{layer}/size"] = float(g.layer_sizes[i])
            for name, table in (("contribution", g.contributions), ("functional_size", e.functional_size)):
                found |= {f"{layer}/{name}/{k}": v for k, v in self._named(table[i]).items()}
        return found

    def _named(self, values: Tensor) -> dict[str, float]:
        pairs = zip(self.environments, values.tolist(), strict=True)
        return {name: value for name, value in pairs if not math.isnan(value)}  # no rows of it in the probe


class ContributionLog:
    """Contributions of every environment to every region: over the whole run, and since a step.

    >>> log = ContributionLog()
    >>> for step in (10, 20, 30):
    ...     log.add(step, "forget", {"a": 1.0, "b": -1.0})
    >>> log.since(10, ["forget"]), log.total(["forget"])
    ({'a': 2.0, 'b': -2.0}, {'a': 3.0, 'b': -3.0})
    """

    def __init__(self) -> None:
        self.cumulative: dict[str, dict[str, float]] = {}
        self.recent: list[tuple[int, str, dict[str, float]]] = []

    def add(self, step: int, region: str, contributions: Mapping[str, float]) -> None:
        """Add the contributions of a step."""
        _add(self.cumulative.setdefault(region, {}), contributions)
        self.recent.append((step, region, dict(contributions)))

    def forget_until(self, step: int) -> None:
        """Drop single entries up to a step; sums stay."""
        self.recent = [entry for entry in self.recent if entry[0] > step]

    def since(self, step: int, regions: Iterable[str]) -> dict[str, float]:
        """Return each environment's contributions to ``regions`` after ``step``, from the entries that are kept."""
        wanted, total = set(regions), dict[str, float]()
        for at, region, contributions in self.recent:
            if at > step and region in wanted:
                _add(total, contributions)
        return total

    def total(self, regions: Iterable[str]) -> dict[str, float]:
        """Return each environment's contributions to ``regions`` over the run."""
        total: dict[str, float] = {}
        for region in regions:
            _add(total, self.cumulative.get(region, {}))
        return total

    def state(self) -> dict[str, Any]:
        """Return the state as plain data."""
        cumulative = {region: dict(values) for region, values in self.cumulative.items()}
        return {"cumulative": cumulative, "recent": [list(entry) for entry in self.recent]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state`."""
        self.cumulative = {region: dict(values) for region, values in state["cumulative"].items()}
        self.recent = [(step, region, dict(values)) for step, region, values in state["recent"]]


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value
