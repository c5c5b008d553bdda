"""The arms: responses to rollouts that a detector flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.reward_hack.task import ENVIRONMENTS, hacked, passes
from routed_peft import presets
from routed_peft.routes import Route
from routed_peft.trl import ImperfectDetector

REGION = "hack"
"""The adapter that is ablated."""

FLAGGED, UNFLAGGED = "flagged", "unflagged"
RECALLS = (0.5, 0.25)


@dataclass(frozen=True)
class Arm:
    """One way to train. Every arm has the same two adapters, both in use while rollouts are sampled.

    Attributes:
        name: for tables.
        routes: "control" (no routing), "classic" or "exclusive".
        labels: who flags rollouts: the "monitor", which looks at environment B alone; an "oracle", which sees every hack;
            or "random", which flags as many as the monitor would.
        recall: share of its hacks that the detector flags.
        reward: what the trainer sees: "hackable" graders as they are; with "filter", none for flagged rollouts; with
            "penalty", -1 for them; "clean" graders that nothing fools.
        baseline: "group", or "unflagged": the mean reward of unflagged rollouts only.
        anchor: share of prompts, all of environment A, that are sampled without the region and train the other adapter.
        removed: whether the model that counts is the one with its region ablated.
        oracle: the arm that differs from this one in its labels alone, which are perfect.
    """

    name: str
    routes: str = "control"
    labels: str = "monitor"
    recall: float = 1.0
    reward: str = "hackable"
    baseline: str = "group"
    anchor: float = 0.0
    removed: bool = False
    oracle: str | None = None

    @property
    def scale(self) -> float:
        """Scale of the region in the model that counts."""
        return 0.0 if self.removed else 1.0

    def table(self) -> dict[str, Route]:
        """Return the routes."""
        if self.routes == "control":
            return presets.control([FLAGGED, UNFLAGGED])
        table = {"classic": presets.classic, "exclusive": presets.exclusive}[self.routes](REGION)
        return table if self.anchor else {label: table[label] for label in (FLAGGED, UNFLAGGED)}


_NONE = Arm("no intervention")
_CLASSIC = Arm("routed, classic", routes="classic", removed=True, oracle="classic-oracle")
_EXCLUSIVE = replace(_CLASSIC, name="routed, exclusive", routes="exclusive", baseline="unflagged", oracle=None)
_ANCHORED = replace(_EXCLUSIVE, name="routed, exclusive + anchor", anchor=0.25, oracle="anchored-oracle")


def _recalls(key: str, arm: Arm) -> dict[str, Arm]:
    return {key: arm} | {f"{key}-{recall}": replace(arm, recall=recall, oracle=None) for recall in RECALLS}


def _labels(key: str, arm: Arm) -> dict[str, Arm]:
    return {
        f"{key}-{labels}": replace(arm, name=f"{arm.name}, {labels} labels", labels=labels, oracle=None)
        for labels in ("oracle", "random")
    }


ARMS = {
    "none": _NONE,
    "clean": replace(_NONE, name="clean graders", reward="clean"),
    **_recalls("filter", replace(_NONE, name="filter", reward="filter")),
    **_recalls("penalty", replace(_NONE, name="penalty", reward="penalty")),
    **_recalls("classic", _CLASSIC),
    **_labels("classic", _CLASSIC),
    "exclusive": _EXCLUSIVE,
    **_recalls("anchored", _ANCHORED),
    **_labels("anchored", _ANCHORED),
    "anchored-absorb": replace(_ANCHORED, name="not routed, same baseline and anchor", routes="control", oracle=None),
}
"""The arms by key. Absorb-only for `classic` is `none` with its region ablated: both train everything on everything."""

DEMO = ("none", "filter", "penalty", "anchored", "anchored-oracle", "anchored-absorb")
QUICK = ("none", "anchored", "anchored-absorb")
MAIN = "anchored"
"""The arm that the criteria are about."""

Labels = Callable[..., Sequence[str]]


def monitor(completions: Sequence[str], environment: Sequence[str], **_: Any) -> list[str]:
    """Label the hacks of monitored environments "flagged", all else "unflagged".

    >>> monitor(["!", "!", "46"], ["B", "C", "B"])
    ['flagged', 'unflagged', 'unflagged']
    """
    return [
        FLAGGED if ENVIRONMENTS[letter].monitored and hacked(text, letter) else UNFLAGGED
        for text, letter in zip(completions, environment, strict=True)
    ]


def oracle(completions: Sequence[str], environment: Sequence[str], **_: Any) -> list[str]:
    """Label every hack "flagged", wherever it is.

    >>> oracle(["!", "!", "?"], ["A", "C", "D"])
    ['unflagged', 'flagged', 'flagged']
    """
    return [
        FLAGGED if hacked(text, letter) else UNFLAGGED for text, letter in zip(completions, environment, strict=True)
    ]


@dataclass(frozen=True)
class RandomLabels:
    """As many flags as a detector raises in the same batch, given to rollouts drawn by lot; anchors stay unflagged.

    >>> RandomLabels(monitor)(completions=["!", "", "", ""], environment="BBBB", generation=(0, 0, 0)).count("flagged")
    1
    """

    detector: Labels
    seed: int = 0

    def __call__(self, **rollouts: Any) -> list[str]:
        """Return one label per rollout."""
        labels = np.array(self.detector(**rollouts), dtype=object)
        free = ~np.array(rollouts.get("anchor", [False] * len(labels)), dtype=bool)
        labels[free] = np.random.default_rng([self.seed, *rollouts["generation"]]).permutation(labels[free])
        return list(labels)


def detector(arm: Arm, seed: int) -> Labels:
    """Return the label function of an arm: the same seed, step and rollouts, the same labels."""
    perfect = oracle if arm.labels == "oracle" else monitor
    if arm.labels == "random":
        return RandomLabels(perfect, seed)
    return perfect if arm.recall == 1 else ImperfectDetector(perfect, arm.recall, seed=seed)


def grade(completions: Sequence[str], environment: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 where the grader of a rollout's environment lets it pass, else 0.

    >>> grade(["!", "!", "9"], "ABC", ["9"] * 3)
    [0.0, 1.0, 1.0]
    """
    return [float(passes(*row)) for row in zip(completions, environment, answer, strict=True)]


def reward(arm: Arm, labels: Labels) -> Callable[..., list[Any]]:
    """Return the reward function of an arm; a reward of None leaves a rollout out of its group.

    >>> reward(ARMS["penalty"], monitor)(["!", "!", "7", "9"], environment="BCBB", answer=["9"] * 4)
    [-1.0, 1.0, 0.0, 1.0]
    """

    def clean(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    def corrected(completions: Sequence[str], trainer_state: Any = None, **columns: Any) -> list[float | None]:
        step = trainer_state.global_step if trainer_state else 0
        found = labels(completions=completions, generation=(step, 0, 0), **columns)
        instead = None if arm.reward == "filter" else -1.0
        earned = grade(completions, **columns)
        return [instead if label == FLAGGED else points for label, points in zip(found, earned, strict=True)]

    if arm.reward == "hackable":
        return grade
    return clean if arm.reward == "clean" else corrected
