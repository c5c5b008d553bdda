"""Label functions for rollouts: by column, environment or advantage, and with simulated errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from routed_peft.data.columns import ROUTE_LABEL, class_names, label_name
from routed_peft.trl.rollouts import LabelFunction, RolloutLabels

FLAGGED, UNFLAGGED = "flagged", "unflagged"


@dataclass(frozen=True)
class ColumnLabels:
    """Labels from a column of each rollout's dataset row.

    Attributes:
        column: name of the column.
        names: names of the classes, for a ClassLabel column.

    Raises:
        ValueError: (when called) if a row lacks the column, or its label is null or a number without a name.

    >>> ColumnLabels()(rows=[{"route_label": "flagged"}])
    ['flagged']
    """

    column: str = ROUTE_LABEL
    names: Sequence[str] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]], **_: Any) -> list[str]:
        """Return one label per rollout."""
        return [label_name(value, self.names) for value in _values(rows, self.column)]


def labels_from_dataset(dataset: Any, eval_dataset: Any = None) -> ColumnLabels:
    """Return labels from the column ``route_label``, which the dataset and all evaluation sets must have."""
    if dataset is None or ROUTE_LABEL not in (dataset.column_names or [ROUTE_LABEL]):
        raise ValueError(f"rollouts have no labels: give `label_fn`, or a column `{ROUTE_LABEL}` in `train_dataset`; "
                         "see `routed_peft.trl.rollout_labels`")  # fmt: skip
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(ds is not None and ROUTE_LABEL not in (ds.column_names or [ROUTE_LABEL]) for ds in evaluated):
        raise ValueError(f"`eval_dataset` lacks the column `{ROUTE_LABEL}`, and its rollouts are labeled like those of "
                         "training: add it, or give a `label_fn` that does not need it")  # fmt: skip
    known = [names for ds in (dataset, *evaluated) if (names := class_names(ds))]
    if other := [names for names in known if names != known[0]]:
        raise ValueError(f"`{ROUTE_LABEL}` has the classes {known[0]} in one dataset and {other[0]} in another: cast "
                         "both to one ClassLabel, or to strings")  # fmt: skip
    return ColumnLabels(names=known[0] if known else None)


@dataclass(frozen=True)
class EnvironmentLabels:
    """Labels from each rollout's environment.

    Attributes:
        labels: environment -> label.
        column: name of the environment's column.
        default: label of other environments; None refuses them.

    Raises:
        ValueError: (when called) on an environment that is not in ``labels``, where there is no ``default``.

    >>> EnvironmentLabels({"hackable": "flagged"}, default="unflagged")(rows=[{"environment": "secure"}])
    ['unflagged']
    """

    labels: Mapping[str, str]
    column: str = "environment"
    default: str | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]], **_: Any) -> list[str]:
        """Return one label per rollout."""
        environments = _values(rows, self.column)
        unknown = sorted({str(e) for e in environments if e not in self.labels})
        if unknown and self.default is None:
            raise ValueError(f"the environments {unknown} have no label, got labels for {list(self.labels)}: add them, "
                             "or set `default`")  # fmt: skip
        return [self.labels.get(environment, str(self.default)) for environment in environments]


@dataclass(frozen=True)
class AdvantageLabels:
    """Flags for rollouts whose advantage is above a threshold.

    Attributes:
        above: the threshold; 0 labels by the sign.
        size: compare the absolute value of the advantage.

    >>> AdvantageLabels(above=1.0)(advantages=[1.5, -2.0]), AdvantageLabels(above=1.0, size=True)(advantages=[0.5, -2.0])
    (['flagged', 'unflagged'], ['unflagged', 'flagged'])
    """

    above: float = 0.0
    size: bool = False
    flagged: str = FLAGGED
    unflagged: str = UNFLAGGED

    def __call__(self, advantages: Sequence[float], **_: Any) -> list[str]:
        """Return one label per rollout."""
        return [self.flagged if (abs(a) if self.size else a) > self.above else self.unflagged for a in advantages]


@dataclass(frozen=True)
class ImperfectDetector:
    r"""A detector of given recall and precision, simulated from a perfect one.

    Every rollout that ``detector`` flags stays flagged with probability ``recall``. In a batch where :math:`TP` of them are
    left beside :math:`N` rollouts that it does not flag, each of the latter is flagged with probability

    .. math:: \min\left(1, \frac{TP}{N} \cdot \frac{1 - \text{precision}}{\text{precision}}\right),

    so both hold in expectation. Which rollouts these are depends on the seed and on the step alone; those found at a
    recall of .25 are among those found at .5.

    Attributes:
        detector: a perfect label function. Only its label ``flagged`` is removed or added.
        recall: in [0, 1].
        precision: in (0, 1].
        seed: same seed, same misses, also after resuming.

    >>> hacks = lambda completions, **_: ["flagged" if "!" in c else "unflagged" for c in completions]
    >>> labels = ImperfectDetector(hacks, recall=0.5)(completions=["!"] * 1000, generation=(0, 0, 0))
    >>> 450 < labels.count("flagged") < 550
    True
    """

    detector: LabelFunction
    recall: float = 1.0
    precision: float = 1.0
    seed: int = 0
    flagged: str = FLAGGED
    unflagged: str = UNFLAGGED

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1 or not 0 < self.precision <= 1:
            raise ValueError(f"`recall` is in [0, 1] and `precision` in (0, 1], got {self.recall} and {self.precision}")

    def __call__(self, **rollouts: Any) -> list[str]:
        """Return one label per rollout."""
        truth = self.detector(**rollouts)
        if isinstance(truth, RolloutLabels) or not all(isinstance(label, str) for label in truth):
            raise ValueError("`ImperfectDetector` takes a detector that returns one plain label per rollout")
        labels = np.array(truth, dtype=object)
        draws = np.random.default_rng([self.seed, *rollouts["generation"]]).random(len(labels))
        positive = labels == self.flagged
        hits = int((positive & (draws < self.recall)).sum())
        wrong = hits * (1 - self.precision) / self.precision / max(1, int((~positive).sum()))
        labels[positive & (draws >= self.recall)] = self.unflagged
        labels[~positive & (draws < wrong)] = self.flagged
        return labels.tolist()


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
    missing = next((row for row in rows if row.get(column) is None), None)
    if missing is not None:
        raise ValueError(f"a row lacks `{column}`, got the columns {sorted(missing)}: every prompt needs one")
    return [row[column] for row in rows]
