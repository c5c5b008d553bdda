"""Numbers of one observation, for the log and the alarms, their sums over a run, and the record of an incident."""

from __future__ import annotations

import copy
import math
import os
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routed_peft.files import read_json, write_json
from routed_peft.monitoring.environments import by_name
from routed_peft.monitoring.growth import Growth
from routed_peft.monitoring.probe import Effect, model_inputs

INCIDENT = "incident.json"


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
        g, e = self.growth, self.effect
        tensors = {"raw_contribution": g.raw.sum(0), "functional_size": e.overall, "kl": e.kl}
        measured = {name: by_name(self.environments, values) for name, values in tensors.items()}
        return {"contribution": self.contributions, **measured, **self.extra}

    def alarm_metrics(self, exempt: Collection[str] = ()) -> dict[str, float]:
        """Return the measured metrics for alarms, without the parts of ``exempt`` environments."""
        growth = self.growth.growth - sum(v for name, v in self.contributions.items() if name in exempt)
        found = {"growth": growth} | ({} if self.weight_drift is None else {"weight_drift": self.weight_drift})
        for metric, measured in self._by_environment().items():
            counted = [v for name, v in measured.items() if name not in exempt]
            if counted and metric in ("raw_contribution", "functional_size", "kl", "reward_gap"):
                found[metric] = max(counted)
        return found

    def flatten(self, by_layer: bool) -> dict[str, float]:
        """Return all numbers under names such as ``kl/ENVIRONMENT``; with ``by_layer`` those of every layer too."""
        g, drift = self.growth, math.nan if self.weight_drift is None else self.weight_drift
        numbers = {"size": g.size, "growth": g.growth, "rest": g.rest, "weight_drift": drift, "captured": g.captured}
        found = {name: value for name, value in numbers.items() if not math.isnan(value)}
        tables = self._by_environment()
        for i, layer in enumerate(self.layers if by_layer else ()):
            found[f"{layer}/size"] = float(g.layer_sizes[i])
            for name, table in (("contribution", g.contributions), ("functional_size", self.effect.functional_size)):
                tables[f"{layer}/{name}"] = by_name(self.environments, table[i])
        return found | {f"{name}/{e}": value for name, values in tables.items() for e, value in values.items()}


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
        self.cumulative[region] = _sum([self.cumulative.get(region, {}), contributions])
        self.recent.append((step, region, dict(contributions)))

    def forget_until(self, step: int) -> None:
        """Drop single entries up to a step; sums stay."""
        self.recent = [entry for entry in self.recent if entry[0] > step]

    def since(self, step: int, regions: Iterable[str]) -> dict[str, float]:
        """Return each environment's contributions to ``regions`` after ``step``, from the entries that are kept."""
        wanted = set(regions)
        return _sum(contributions for at, region, contributions in self.recent if at > step and region in wanted)

    def total(self, regions: Iterable[str]) -> dict[str, float]:
        """Return each environment's contributions to ``regions`` over the run."""
        return _sum(self.cumulative.get(region, {}) for region in regions)

    def state(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return copy.deepcopy({"cumulative": self.cumulative, "recent": [list(entry) for entry in self.recent]})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state`."""
        state = copy.deepcopy(state)
        self.cumulative, self.recent = state["cumulative"], [tuple(entry) for entry in state["recent"]]


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, value in (item for part in parts for item in part.items()):
        total[name] = total.get(name, 0.0) + value
    return total


@dataclass(frozen=True)
class Incident:
    """A halt of a run and its causes.

    Attributes:
        step: of the halt.
        onset_step: the last step before the onset of its first alarm.
        alarms: series (``region/metric``) -> value, limit, CUSUM level and onset.
        environments: ``name``, and signed contributions to the growth of the alarmed regions: ``since_onset``, and
            ``cumulative`` over the run; the largest since onset first.
        named: the fewest environments with most of the growth since onset (`rank_blame`).
        samples: recent rows of these environments: ``environment``, ``step``, ``text``, ``input_ids``.
    """

    step: int
    onset_step: int
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def write(self, run_dir: str | os.PathLike[str]) -> Path:
        """Write ``incident.json`` into a run's directory, atomically, and return its path."""
        write_json(path := Path(run_dir) / INCIDENT, asdict(self))
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Incident:
        """Read ``incident.json``, or that of a run's directory; raise ValueError if it is missing or damaged."""
        file = Path(path) / INCIDENT if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"{file} does not exist: the run was not halted, or has been rolled back already")
        try:
            return cls(**read_json(file))
        except TypeError as error:
            raise ValueError(f"{file} is no incident ({error}): restore it from a copy") from error


def rank_blame(
    since_onset: Mapping[str, float], cumulative: Mapping[str, float], *, blame: float, exempt: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rank environments by contribution since onset; name the fewest with the share ``blame`` of all positive ones.

    Those that are ``exempt`` are ranked but never named, and do not count. If no other has contributed since, contributions
    over the run count: a hack that always pays has no gradient any more.

    >>> rank_blame({"a": -1.0, "b": 3.0, "c": 1.0}, {"a": 5.0, "b": 3.0, "c": 1.0}, blame=0.5)[1]
    ['b']
    >>> rank_blame({"a": 9.0, "b": 3.0}, {"a": 9.0, "b": 3.0}, blame=0.5, exempt=["a"])[1]
    ['b']
    >>> rank_blame({"a": 0.0, "b": -1.0}, {"a": 1.0, "b": 3.0}, blame=0.5)[1]
    ['b']
    """
    recent = {name: since_onset.get(name, 0.0) for name in cumulative}
    ranked = sorted(recent, key=lambda name: -recent[name])
    table = [{"name": name, "since_onset": recent[name], "cumulative": cumulative[name]} for name in ranked]
    suspects = [name for name in ranked if name not in exempt]
    fed = recent if any(recent[name] > 0 for name in suspects) else cumulative
    positive = sum(max(fed[name], 0.0) for name in suspects)
    named: list[str] = []
    for name in sorted(suspects, key=lambda name: -fed[name]):
        if fed[name] > 0 and sum(fed[n] for n in named) < blame * positive:
            named.append(name)
    return table, named


class RowSamples:
    """The last ``size`` rows of every environment.

    >>> samples = RowSamples(size=1)
    >>> ids = torch.tensor([[1, 2], [3, 4]])
    >>> samples.keep({"input_ids": ids}, {"a": torch.tensor([0, 1])}, step=5)
    >>> samples.decode(tokenizer=None)
    {'a': [{'environment': 'a', 'step': 5, 'input_ids': [1, 2], 'text': None}]}
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: dict[str, deque[dict[str, Any]]] = defaultdict(lambda: deque(maxlen=size))

    def keep(self, inputs: Mapping[str, Any], rows: Mapping[str, Tensor], step: int) -> None:
        """Keep the first rows of each environment in a batch, without padding; ``rows`` are their indices."""
        tokens = model_inputs(inputs)
        mask = tokens.get("attention_mask", torch.ones_like(tokens["input_ids"])) != 0
        for name, index in rows.items():
            for row in index[: self.size].tolist():
                ids = tokens["input_ids"][row][mask[row]]
                self._rows[name].append({"environment": name, "step": step, "input_ids": ids})

    def decode(self, tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
        """Return the rows by environment as plain data, with their ``text`` if the tokenizer can decode."""
        text = getattr(tokenizer, "decode", lambda ids: None)
        plain = lambda row: {**row, "input_ids": (ids := row["input_ids"].tolist()), "text": text(ids)}
        return {name: [plain(row) for row in rows] for name, rows in self._rows.items()}
