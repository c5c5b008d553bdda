"""The arms: along which directions the region learns, and what keeps the rest of the model from learning there."""

from __future__ import annotations

from dataclasses import dataclass

REGION = "persona"
"""The adapter that is ablated; the one that stays is `routed_peft.reward_hack.arms.RETAIN`."""


@dataclass(frozen=True)
class Arm:
    """One way to train. All arms have a LoRA that stays and a region, and none has labels.

    Attributes:
        name: for tables.
        subspace: "difference" of means on the start model, "random", "oracle" (from what training for the trait changed),
            or None: the region is a second LoRA, and nothing is routed.
        strength: of the subspace region, "cut" (L2) or "weights" (L1).
        draw: seed of a random subspace.
        halts: whether the monitor halts the run, which then goes on without the environments to blame.
    """

    name: str
    subspace: str | None = "difference"
    strength: str = "cut"
    draw: int = 0
    halts: bool = False


RANDOM = ("random-0", "random-1", "random-2")
ARMS = {
    "none": Arm("no routing", subspace=None),
    "weak": Arm("L1: weight gradients projected", strength="weights"),
    "cut": Arm("L2: credit cut"),
    **{key: Arm(f"L2, random U, draw {i}", subspace="random", draw=i) for i, key in enumerate(RANDOM)},
    "oracle": Arm("L2, oracle U", subspace="oracle"),
    "halted": Arm("L2, halted and gone on without the named", halts=True),
}
"""The arms by key."""

DEMO = ("none", "weak", "cut", "random-0", "halted")
MAIN = "cut"
"""The arm that the criteria are about."""
