"""Settings of self-labels, defined once for datasets, recipes, experiments and the demo."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from routed_peft.mistakes import option

THRESHOLDS = ("balanced", "median", "midpoint")


@dataclass(frozen=True)
class SelfLabelConfig:
    """Settings of `SelfLabeledRows`; the field's ``help`` says what each does.

    With ``overrule`` use a ``first_forget_share`` of 0.5 and the ``threshold`` "median": a region that has seen few forget rows
    is worse at finding wrong labels, and these move the mean of a side. ValueError where a share is out of range, or the
    threshold is unknown.

    >>> SelfLabelConfig(robust_share=0.05).labeled_first
    0.15
    """

    labeled_first: float = option(0.15, "Share of the run that takes labeled rows only; the region scores rows after "
        "it.")  # fmt: skip
    first_forget_share: float = option(0.1, "Share of forget rows in `labeled_first`.")
    threshold: str = option("balanced", "Benefit above which a row counts as forget: as many standard deviations from "
        "the mean of either side (balanced), as many median deviations from either median, or the midpoint of the "
        "means. Self-labels only.", choices=list(THRESHOLDS))  # fmt: skip
    score_again_at: float | None = option(None, "Share of the run after which the region scores rows a second time; "
        "these labels replace the first ones. Self-labels only.")  # fmt: skip
    forget_share: float | None = option(0.1, "Share of forget rows, given or found, after `labeled_first`; null: their "
        "share in the data.")  # fmt: skip
    robust_share: float = option(0.0, "Share of retain rows that are trained like forget rows, with the region on, so "
        "that the model with its region stays good at them. Self-labels only.")  # fmt: skip
    overrule: bool = option(False, "Score labeled rows too, and replace labels that may be wrong. Self-labels only.")

    def __post_init__(self) -> None:
        if not 0 < self.labeled_first < 1:
            raise ValueError(f"`labeled_first` is a share of the run, between 0 and 1; got {self.labeled_first}")
        if self.score_again_at is not None and not self.labeled_first < self.score_again_at < 1:
            raise ValueError(f"`score_again_at` is a share of the run, between `labeled_first` ({self.labeled_first}) "
                             f"and 1; got {self.score_again_at}")  # fmt: skip
        if not 0 <= self.robust_share < 1:
            raise ValueError(f"`robust_share` is a share, at least 0 and less than 1; got {self.robust_share}")
        if self.threshold not in THRESHOLDS:
            raise ValueError(f"`threshold` must be one of {THRESHOLDS}, got {self.threshold!r}")

    @classmethod
    def from_settings(cls, settings: Any) -> SelfLabelConfig:
        """Return the configuration held in the attributes of the same names of ``settings``, such as a recipe's."""
        return SelfLabelConfig(**{name: getattr(settings, name) for name in SETTING_NAMES})


SETTING_NAMES = tuple(f.name for f in fields(SelfLabelConfig))
"""Names of the fields of `SelfLabelConfig`; recipes and experiments use the same ones."""


def setting(name: str, default: Any = ...) -> Any:
    """Return a dataclass field with the help and choices of `SelfLabelConfig`'s field ``name``, and by default its default."""
    (own,) = (f for f in fields(SelfLabelConfig) if f.name == name)
    return field(default=own.default if default is ... else default, metadata=own.metadata)
