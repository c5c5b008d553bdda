"""`Incident`: the record of a halted run, with its alarms and the environments that caused them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routed_peft.files import read_json, write_json
from routed_peft.monitoring.alarms import Alarms
from routed_peft.monitoring.observation import ContributionLog

INCIDENT = "incident.json"


@dataclass(frozen=True)
class Incident:
    """A halt of a run and its causes.

    Attributes:
        step: of the halt.
        onset_step: the last step before the onset of its first alarm.
        alarms: series (``region/metric``) -> value, limit, CUSUM level and onset.
        environments: ``name``, and signed contributions to the growth of the alarmed regions: ``since_onset``, and
            ``cumulative`` over the run; the largest since onset first.
        named: the fewest environments with most of the growth since onset (`rank_environments`).
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


def describe_incident(
    step: int,
    alarms: Alarms,
    *,
    contributions: ContributionLog,
    samples: Mapping[str, Iterable[Mapping[str, Any]]],
    blame: float,
    exempt: Collection[str] = (),
) -> Incident:
    """Describe the incident of a run with alarms, which names environments for the share ``blame`` of positive contributions.

    ``samples`` are rows by environment. Those that are ``exempt`` are ranked but never named; they do not count.
    """
    raised, onset = alarms.raised, alarms.onset_step
    regions = sorted({name.partition("/")[0] for name in raised})
    since, total = contributions.since(onset, regions), contributions.total(regions)
    table, named = rank_environments(since, total, blame=blame, exempt=exempt)
    numbers = {
        name: {"value": s.value, "limit": s.limit, "cusum": s.cusum and s.cusum.level, "clean_step": s.clean_step}
        for name, s in raised.items()
    }
    return Incident(step, onset, numbers, table, named, [dict(row) for name in named for row in samples.get(name, ())])


def rank_environments(
    since_onset: Mapping[str, float], cumulative: Mapping[str, float], *, blame: float, exempt: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rank environments by contribution since onset; name the fewest with the share ``blame`` of all positive ones.

    If no environment that can be named has contributed since, contributions over the run count: a hack that always pays
    has no gradient any more.

    >>> rank_environments({"a": -1.0, "b": 3.0, "c": 1.0}, {"a": 5.0, "b": 3.0, "c": 1.0}, blame=0.5)[1]
    ['b']
    >>> rank_environments({"a": 9.0, "b": 3.0}, {"a": 9.0, "b": 3.0}, blame=0.5, exempt=["a"])[1]
    ['b']
    >>> rank_environments({"a": 0.0, "b": -1.0}, {"a": 1.0, "b": 3.0}, blame=0.5)[1]
    ['b']
    """
    recent = {name: since_onset.get(name, 0.0) for name in cumulative}
    ranked = sorted(recent, key=lambda name: -recent[name])
    table = [{"name": name, "since_onset": recent[name], "cumulative": cumulative[name]} for name in ranked]
    suspects = [name for name in ranked if name not in exempt]
    fed = recent if any(recent[name] > 0 for name in suspects) else cumulative
    positive = sum(max(fed[name], 0.0) for name in suspects)
    named: list[str] = []
    explained = 0.0
    for name in sorted(suspects, key=lambda name: -fed[name]):
        if fed[name] <= 0 or explained >= blame * positive:
            break
        named.append(name)
        explained += fed[name]
    return table, named
