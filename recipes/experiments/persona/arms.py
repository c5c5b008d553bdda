"""The arms: directions along which the region learns, and means to keep the rest of the model from learning there."""

from __future__ import annotations

from dataclasses import dataclass

REGION = "persona"
"""The adapter that is ablated; the one that stays is `experiments.common.toy_model.RETAIN`."""


@dataclass(frozen=True)
class Arm:
    """One way to train. All arms have a LoRA that stays and a region, and none has labels.

    Attributes:
        name: for tables.
        subspace: "difference" of means on the start model, "random", "oracle" (from what training for the trait changed),
            or None: the region is a second LoRA, and nothing is routed.
        strength: of the subspace region, "cut" (L2) or "weights" (L1).
        draw: seed of a random subspace.
        fast: whether the region learns at a rate of its own, so that the rest is no longer paid for the trait.
        halts: whether the monitor halts the run, which then goes on without the environments to blame.
        innocent: whether the guilty environments are left out from the start.
        late: whether the guilty environments are innocent at first.
    """

    name: str
    subspace: str | None = "difference"
    strength: str = "cut"
    draw: int = 0
    fast: bool = True
    halts: bool = False
    innocent: bool = False
    late: bool = False


RANDOM = ("random-0", "random-1", "random-2")
ARMS = {
    "none": Arm("no routing", subspace=None),
    "weak": Arm("L1: weight gradients projected", strength="weights"),
    "cut": Arm("L2: credit cut"),
    **{key: Arm(f"L2, random U, draw {i}", subspace="random", draw=i) for i, key in enumerate(RANDOM)},
    "oracle": Arm("L2, oracle U", subspace="oracle"),
    "slow": Arm("L2, region at the rate of the rest", fast=False),
    "innocent": Arm("L2, innocent environments only", innocent=True),
    "halted": Arm("L2, halted, the named environments dropped", halts=True),
    "late": Arm("L2, guilty from step 30 on, halted, the named dropped", halts=True, late=True),
}
"""The arms by key."""

DEMO = ("none", "weak", "cut", "random-0", "innocent", "halted")
HALTED = ("halted", "late")
MAIN = "cut"
"""The arm that the criteria are about."""
