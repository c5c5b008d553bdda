"""Anchor rollouts: rollouts of trusted prompts, sampled with the regions ablated, which train the base alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from routed_peft.routes import Route, Routes
from routed_peft.trl.config import RoutedGRPOConfig
from routed_peft.trl.rollouts import ANCHOR


def anchor_groups(
    environments: Sequence[str | None], share: float, *, trusted: Collection[str] | None, seed: Sequence[int]
) -> np.ndarray:
    """Draw the groups whose rollouts are sampled with the regions ablated: bool, one per group.

    ``environments`` are those of each group of a generation batch, over all processes. ``share`` is of all groups; a fraction
    of a group is rounded up or down at random. Fewer are drawn where fewer are ``trusted`` (None: all).

    >>> anchor_groups(["A", "B", "A", "B"], 0.5, trusted=["A"], seed=[0]).tolist()
    [True, False, True, False]
    """
    rng = np.random.default_rng(seed)
    wanted = int(len(environments) * share + rng.random())
    eligible = np.array([trusted is None or environment in trusted for environment in environments], dtype=bool)
    chosen = rng.permutation(np.flatnonzero(eligible))[:wanted]
    return np.isin(np.arange(len(environments)), chosen)


def with_anchor_route(routes: Routes, regions: Sequence[str], args: RoutedGRPOConfig) -> Routes:
    """Return ``routes`` with one for anchor rollouts where ``args`` asks for them; raise where its anchors would be wrong."""
    if args.anchor_share and ANCHOR not in routes:
        routes = {**routes, ANCHOR: Route(ablated=tuple(regions))}
    if args.anchor_share and set(routes[ANCHOR].ablated) != set(regions):
        raise ValueError(f"anchor rollouts are sampled without any region, so the route of {ANCHOR!r} ablates all of "
                         f"{list(regions)}; got {routes[ANCHOR]}")  # fmt: skip
    taught = {name for name, route in routes.items() if name != ANCHOR and not route.weight("base")}
    if args.anchor_share and (missing := sorted(taught - set(args.flagged_labels))):
        raise ValueError(f"an anchor rollout with the label {missing[0]!r} would train the base, which the route of "
                         f"{missing[0]!r} does not: add {missing} to `flagged_labels`, now {args.flagged_labels}")  # fmt: skip
    if args.baseline_over == "unflagged" and not set(args.flagged_labels) & set(routes):
        got = f"none of `flagged_labels` {args.flagged_labels} is a label of `routes`, which has {list(routes)}"
        raise ValueError(f'`baseline_over="unflagged"`: {got}')
    return routes
