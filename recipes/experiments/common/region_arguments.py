"""Settings of the regions of a recipe: their names, their parts and their schedule."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from routed_peft.mistakes import check_numbers, check_shape, option
from routed_peft.regions.config import PARTS, RoutedConfig
from routed_peft.training import RegionSchedule

SIZE = 64
"""Hidden units of a region where no part is given and there is no schedule."""


@dataclass
class RegionArguments:
    """Settings of the regions of a run; recipes inherit them, and every field is a flag."""

    region: str = option("forget", "Name of the region.")
    regions: list[str] = option([], "Names of several regions with `method: access`, which label their rows; by default "
        "`region` alone.")  # fmt: skip
    schedule: dict | str | None = option(None, "With `method: access`, fields of `RegionSchedule` beside `regions`: "
        "{consistency: 3.0}.")  # fmt: skip
    size: int | None = option(None, f"Hidden units that a region adds to every MLP. Without any part, {SIZE}; with "
        "`method: access` a whole region, in proportion to the base.")  # fmt: skip
    r: int | None = option(None, "Rank of a region's updates of linear layers.")
    embeddings: list | str | None = option(
        None, "A region's rows of the token table: `full`, a rank, or a list of ids."
    )
    heads: int | None = option(None, "Key-value heads that a region adds to every attention.")
    norms: bool | None = option(None, "Whether a region has gains of its own in every norm.")
    target_modules: list[str] = option([], "Names of the MLPs, or of the linear layers of `r`; by default those known of "
        "the model's type.")  # fmt: skip

    def take_regions(self, *, scheduled: bool) -> None:
        """Fill in the settings that are left open, and check all; only ``scheduled`` regions may be several.

        The whole schedule is written out, so that a run that resumes is compared with all of it.

        Raises:
            ValueError: on a part, a name or a schedule that cannot be, or one that would be ignored.
        """
        check_numbers(self, "size", "r", "heads", low=1)
        if isinstance(self.embeddings, str) and self.embeddings != "full":
            self.embeddings = _from_json("embeddings", self.embeddings)
        if scheduled:
            if self.regions and self.region not in ("forget", *self.regions):
                raise ValueError(f"`region` is {self.region!r} beside `regions` {self.regions}: leave one of them out")
            self.regions = self.regions or [self.region]
            found = self.region_schedule()
            self.schedule = {name: value for name, value in asdict(found).items() if name in _settings()}
        elif given := [name for name in ("regions", "schedule") if getattr(self, name)]:
            raise ValueError(f"`{given[0]}` needs `method: access`: choose that, or leave it out")
        elif not self.region_config().given_parts():
            self.size = SIZE
        self.region_config()

    def region_config(self) -> RoutedConfig:
        """Return the configuration of each region."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in PARTS}
        return RoutedConfig(**parts, target_modules=self.target_modules or None, task_type="CAUSAL_LM")

    def region_schedule(self) -> RegionSchedule:
        """Return the schedule of the regions; ValueError on an unknown setting or a bad value."""
        own = _from_json("schedule", self.schedule) if isinstance(self.schedule, str) else self.schedule or {}
        known = _settings()
        check_shape(own, dict, "schedule")
        if unknown := [name for name in own if name not in known]:
            raise ValueError(f"`schedule` has no setting {unknown[0]!r}: it has {', '.join(known)}")
        check_shape(own, {name: known[name] for name in own}, "schedule")
        return RegionSchedule(self.regions, **own)


def _settings() -> dict[str, Any]:
    """Return the settings of a schedule beside its regions, with their types."""
    types = {one.name: type(one.default) for one in fields(RegionSchedule) if one.init and one.name != "regions"}
    return {name: int | float if kind is float else kind for name, kind in types.items()}


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON, got {text!r}: {error}") from error
