"""The arms: rows trained on, and their routes; and two selections of labeled rows."""

from __future__ import annotations

from dataclasses import dataclass

from routed_peft import presets
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.routes import Routes

REGION = "style"
"""The adapter that is dropped; the one that stays is `experiments.common.toy_model.RETAIN`."""

LABELS = {"half": "half of the rows, drawn by lot", "context": "the rows of one template only"}
"""Rows that carry a label at all."""


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune. All arms have the same two LoRAs on a frozen model.

    Attributes:
        name: for tables.
        method: of the routes: "sgtm", "classic", "exclusive"; None trains everything on every row.
        drop: column by which rows of the style are left out: "route_label", "side" (the truth), or None.
    """

    name: str
    method: str | None = None
    drop: str | None = None

    @property
    def labels(self) -> bool:
        """True where labels make a difference."""
        return self.method is not None or self.drop == "route_label"

    def routes(self) -> Routes:
        """Return the routes of the labels forget, retain and unlabeled."""
        if self.method is None:
            return presets.control()
        if self.method == "sgtm":
            return presets.sgtm(REGION)
        rl = {"classic": presets.classic, "exclusive": presets.exclusive}[self.method](REGION)
        return {FORGET: rl["flagged"], RETAIN: rl["unflagged"], UNLABELED: rl["unflagged"]}


ARMS = {
    "none": Arm("no routing"),
    "filter": Arm("filter, same labels", drop="route_label"),
    "perfect_filter": Arm("perfect filter", drop="side"),
    "classic": Arm("classic", method="classic"),
    "exclusive": Arm("exclusive", method="exclusive"),
    "sgtm": Arm("sgtm", method="sgtm"),
}
"""The arms by key."""

MAIN = "sgtm"
"""The arm that the criteria are about."""
