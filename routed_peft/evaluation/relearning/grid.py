"""The grid of an attack, learning rates by seeds: its checks, and rates beyond its ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from routed_peft.evaluation.measures import worst_case
from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.relearning.curves import Curve, log_spaced
from routed_peft.evaluation.relearning.data import AttackData

Cell = tuple[float, int]
"""Learning rate and seed."""


def open_ends(curves: Mapping[Cell, Curve], seeds: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Return the ends of the grid (-1, 1) at which the best rate lies, at one step of the attack or another.

    Where no rate helps the attacker at all, all may be too large: that is the lower end.
    """
    rates = sorted({rate for rate, _ in curves})
    target = next(iter(curves.values())).target
    losses = {rate: [curves[rate, seed].losses(target) for seed in seeds] for rate in rates}
    best = {entry.learning_rate for entry in worst_case(steps, losses) if entry.at > 0}
    if not best:
        return [-1]
    return [side for side, rate in ((-1, rates[0]), (1, rates[-1])) if rate in best]


def next_rate(rates: Sequence[float], side: int) -> float:
    """Return the next rate beyond an end of the grid, as far away as that end's neighbor; threefold without a neighbor.

    >>> next_rate([1e-3, 2e-3], 1), next_rate([3e-3], -1)
    (0.004, 0.001)
    """
    edge, inner = (rates[-1], rates[-2:][0]) if side > 0 else (rates[0], rates[:2][-1])
    return float(f"{edge * (edge / inner if edge != inner else 3.0**side):.4g}")


def check_settings(
    attack: Attack, data: AttackData, *, rates: Sequence[float], seeds: Sequence[int], steps: Sequence[int]
) -> None:
    """Raise ValueError where an attack cannot be run, before anything is."""
    trains = attack.method != "none"  # without training the rate is 0
    check_grid(rates, seeds, steps=steps, trains=trains)
    if trains:
        for seed in seeds:
            data.for_training(attack, seed)


def check_grid(
    rates: Sequence[float],
    seeds: Sequence[int],
    *,
    steps: Sequence[int],
    names: Sequence[str] = ("learning_rates", "steps"),
    trains: bool = True,
) -> None:
    """Raise ValueError unless rates are positive and different, seeds different, and steps ascend from 0.

    ``names`` are the user's names for rates and steps; a rate may be 0 where nothing trains.
    """
    if not rates or len(set(rates)) < len(rates) or trains and not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"`{names[0]}` must be different positive numbers, at least one, got {list(rates)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"`seeds` must be different whole numbers, at least one, got {list(seeds)}")
    if list(steps) != sorted(set(steps)) or not steps or steps[0] != 0:
        raise ValueError(f"`{names[1]}` must ascend from 0, got {list(steps)}; for example {log_spaced(100)}")
