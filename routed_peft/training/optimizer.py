"""Parameter groups of one optimizer by routing group, with learning rates, clipping and idle steps of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from routed_peft.routes import BASE, Routes
from routed_peft.routing.groups import JOINT


def tag_groups(
    optimizer: torch.optim.Optimizer,
    groups: Mapping[nn.Parameter, str],
    *,
    region_learning_rate: float | None = None,
    region_weight_decay: float | None = None,
) -> None:
    """Split the parameter groups of a fresh ``optimizer`` by routing group, in place, and tag them ``"route"``.

    ``groups`` are parameter -> ``"base"``, ``"joint"`` or a region. Regions take ``region_learning_rate``, a peak rate, and
    ``region_weight_decay`` where these are given; the latter only where there was any decay, so norms and biases stay
    free of it. ValueError on an optimizer with parameters that are in no group.

    >>> a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([a, b], lr=0.1)
    >>> tag_groups(optimizer, {a: "base", b: "forget"}, region_learning_rate=0.3)
    >>> [(group["route"], group["lr"]) for group in optimizer.param_groups]
    [('base', 0.1), ('forget', 0.3)]
    """
    # Adagrad has a state before its first step
    stepped = any(float(state.get("step", 1)) for state in optimizer.state.values())
    assert not stepped, "tag_groups is for an optimizer that has not stepped"
    if any(p not in groups for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{type(optimizer).__name__} has parameters that are not the model's own, such as one that "
                         "steps within the backward pass: idle groups could not be left out. Take another `optim`, "
                         "such as 'adamw_torch'")  # fmt: skip
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_route: dict[str, list[nn.Parameter]] = {}
        for p in group["params"]:
            by_route.setdefault(groups[p], []).append(p)
        for route, parameters in by_route.items():
            new = {**group, "params": parameters, "route": route}
            if route not in (BASE, JOINT):
                if region_learning_rate is not None:
                    new["lr"] = region_learning_rate
                if region_weight_decay is not None and group.get("weight_decay"):
                    new["weight_decay"] = region_weight_decay
            split.append(new)
    optimizer.param_groups[:] = split


def drop_idle_gradients(optimizer: torch.optim.Optimizer, idle: Collection[str]) -> None:
    """Set gradients of the groups in ``idle`` to None, so that this step leaves them and their state alone.

    A gradient of zero would not do: Adam moves such a parameter by momentum, about nine learning rates over 20 steps, and
    its second moment decays, which makes the next real step larger.
    """
    for group in optimizer.param_groups:
        if group["route"] in idle:
            for p in group["params"]:
                p.grad = None


def clips_by_group(routes: Routes, groups: Collection[str], *, wanted: bool | None) -> bool:
    """Return whether groups are clipped on their own: as ``wanted``, or by default where a route keeps data from a group.

    A common norm would let data shrink, or make NaN, the update of a group that it must not train. ``groups`` are those
    with trained parameters, and ``wanted`` is `RoutedArguments.clip_per_group`.
    """
    if wanted is not None:
        return wanted
    return any(not route.weight(group) for route in routes.values() for group in groups if group != JOINT)


def clip_by_group(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clip the gradient norm of every routing group to ``max_norm`` on its own; return the norm over all before clipping."""
    routes: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        routes.setdefault(group["route"], []).extend(group["params"])
    norms = [nn.utils.clip_grad_norm_(parameters, max_norm) for parameters in routes.values()]
    return torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]).norm()
