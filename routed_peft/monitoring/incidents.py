"""What a halted run leaves: ``incident.json``, with whatever says why and because of whom."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routed_peft.files import read_json, write_json
from routed_peft.monitoring.alarms import Alarms
from routed_peft.monitoring.observation import Ledger

INCIDENT = "incident.json"


@dataclass(frozen=True)
class Incident:
    """Why a run was halted.

    Attributes:
        step: at which it was.
        onset_step: the last step before the first of its alarms began.
        alarms: by series (``region/metric``): its value, limit, CUSUM level and onset.
        environments: the environment's ``name``, signed contribution to the growth of the alarmed regions ``since_onset`` and
            ``cumulative`` over the run; the largest since onset first.
        named: the fewest environments that make up most of the growth since onset (`rank`).
        samples: rows that these environments had lately: ``environment``, ``step``, ``text``, ``input_ids``.
    """

    step: int
    onset_step: int
    alarms: dict[str, dict[str, Any]] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def write(self, run_dir: str | os.PathLike[str]) -> Path:
        """Write ``incident.json`` into a run's directory, aside and then renamed."""
        write_json(path := Path(run_dir) / INCIDENT, asdict(self))
        return path

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Incident:
        """Read ``incident.json``, or that of a run's directory.

        Raises:
            ValueError: where it is missing or damaged.
        """
        file = Path(path) / INCIDENT if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"there is no {file}: the run was not halted, or has been rolled back already")
        try:
            return cls(**read_json(file))
        except TypeError as error:
            raise ValueError(f"{file} is no incident ({error}): restore it from a copy") from error


def describe(
    step: int,
    alarms: Alarms,
    ledger: Ledger,
    samples: Mapping[str, Iterable[Mapping[str, Any]]],
    blame: float,
    exempt: Collection[str] = (),
) -> Incident:
    """Return the incident that alarms at a step amount to.

    Args:
        step: the step.
        alarms: of which some are raised.
        ledger: who contributed what.
        samples: rows by environment.
        blame: environments are named until they make up this share of all positive contributions since onset.
        exempt: environments that are ranked and never named; their contributions do not count.
    """
    raised, onset = alarms.raised, alarms.onset_step
    regions = sorted({name.partition("/")[0] for name in raised})
    table, named = rank(ledger.since(onset, regions), ledger.total(regions), blame, exempt)
    numbers = {
        name: {
            "value": series.value,
            "limit": series.limit,
            "cusum": series.cusum.level if series.cusum else None,
            "clean_step": series.clean_step,
        }
        for name, series in raised.items()
    }
    return Incident(step, onset, numbers, table, named, [dict(row) for name in named for row in samples.get(name, ())])


def rank(
    since_onset: Mapping[str, float], cumulative: Mapping[str, float], blame: float, exempt: Collection[str] = ()
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rank environments by contribution since onset; name the fewest that make up the share ``blame`` of all positive ones.

    Where none of those that can be named has contributed since, they are named by their contributions over the run: a hack
    that always pays has no gradient any more.

    Example:
        >>> rank({"a": -1.0, "b": 3.0, "c": 1.0}, {"a": 5.0, "b": 3.0, "c": 1.0}, 0.5)[1]
        ['b']
        >>> rank({"a": 9.0, "b": 3.0}, {"a": 9.0, "b": 3.0}, 0.5, exempt=["a"])[1]
        ['b']
        >>> rank({"a": 0.0, "b": -1.0}, {"a": 1.0, "b": 3.0}, 0.5)[1]
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
