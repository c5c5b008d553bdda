"""The arms: one routed run, and the models trained apart that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

CORE = "core"
"""Name of the text outside all topics, in tables and subsets."""


@dataclass(frozen=True)
class Arm:
    """One way to make models.

    Attributes:
        name: for tables.
        kind: "plain" (no region), "all" (regions, which learn from everything), "routed", or "branch" (the core first, then
            each region on the frozen base).
        topics: "all", "none" or "one": those whose rows a plain model sees; "one" makes a model for each topic.
        consistency: weight of the consistency pass; None for the schedule's own.
        region: parts of a region in place of the settings', "units" for hidden units alone.
    """

    name: str
    kind: str = "plain"
    topics: str = "all"
    consistency: float | None = None
    region: str = "whole"


ARMS = {
    "dense": Arm("trained on everything"),
    "dense_regions": Arm("the same, with the regions' parameters", kind="all"),
    "core_only": Arm("perfect filter: the core alone", topics="none"),
    "one_topic": Arm("core and one topic: a model for each", topics="one"),
    "routed": Arm("routed, whole regions", kind="routed"),
    "silent_off": Arm("the same without the consistency pass", kind="routed", consistency=0.0),
    "units": Arm("routed, hidden units alone", kind="routed", region="units"),
    "branch": Arm("filter, then a branch on the frozen base for each", kind="branch"),
}
"""The arms by key."""

MAIN = "routed"
"""The arm that the criteria are about."""
