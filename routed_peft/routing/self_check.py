"""Check on a real batch that gradient arrives where the routes say: one backward pass per label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from routed_peft.routes import Route


def check_gradients(
    loss: Callable[[], Tensor], label: str, *, route: Route, groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, bool]:
    """Run one backward pass under ``route``, and compare the groups that received gradient with those that should.

    Args:
        loss: computes the loss under the route; called once.
        label: the route's label, for messages.
        route: the weights to expect.
        groups: parameters by group; an empty group is skipped.

    Returns:
        group -> whether it received gradient. The random state is left as it was; gradients are the caller's to clear.

    Raises:
        ValueError: where the two differ.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        value = loss()
        if not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(
                f"self-check: the loss of the first batch is {value.detach()}, so gradients tell nothing. Look for bad rows, "
                "weights spoiled by an earlier run (too high a learning rate), or too low a precision"
            )
        value.backward()
    received = {group: _received(parameters) for group, parameters in groups.items() if parameters}
    for group, got in received.items():
        if got and not route.weight(group):
            raise ValueError(
                f"self-check: data labeled {label!r} must not train {group!r}, but gradient arrived there. One of its "
                "parameters is probably read outside its own module's forward (a fused loss or kernel that takes `weight`)."
            )
        if not got and route.weight(group):
            raise ValueError(
                f"self-check: data labeled {label!r} should train {group!r}, but no gradient arrived. Look for a region "
                "whose output is dropped, or a batch without tokens that have a loss (all labels -100)"
            )
    return received


def _received(parameters: Sequence[nn.Parameter]) -> bool:
    grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters if p.grad is not None]
    found = torch.tensor(float(any(bool(g.count_nonzero()) for g in grads)), device=parameters[0].device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)  # one shard may hold zeros only
    return bool(found)
