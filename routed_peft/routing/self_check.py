"""Checks on a real batch that gradient arrives where the routes say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from routed_peft.routes import Route


def check_gradients(
    loss: Callable[[], Tensor],
    label: str,
    *,
    route: Route,
    groups: Mapping[str, Sequence[nn.Parameter]],
    leaks: Sequence[str] = (),
) -> dict[str, bool]:
    """Run one backward pass under ``route``, and compare the groups that received gradient with those that should.

    ``loss`` computes the loss under the route, and is called once. ``groups`` are parameters by group; an empty one is
    skipped. The ``label`` and ``leaks``, parameters that `find_leaks` found, are for messages.

    Returns:
        group -> whether it received gradient. The random state is left as it was; gradients are the caller's to clear.

    Raises:
        ValueError: where the two differ.
    """
    with _same_randomness():
        value = loss()
        if not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(f"self-check: the loss of the first batch is {value.detach()}, so gradients tell nothing. "
                             "Look for bad rows, weights spoiled by an earlier run (too high a learning rate), or too "
                             "low a precision")  # fmt: skip
        value.backward()
    groups = {group: parameters for group, parameters in groups.items() if parameters}
    received = dict(zip(groups, _received(groups.values()), strict=True))
    for group, got in received.items():
        if got and not route.weight(group):
            which = f"{_some(leaks)}: read" if leaks else "One of its parameters is probably read"
            raise ValueError(f"self-check: data labeled {label!r} must not train {group!r}, but gradient arrived "
                f"there. {which} outside its own module's forward (a fused loss or kernel that takes `weight`).")  # fmt: skip
        if not got and route.weight(group):
            raise ValueError(f"self-check: data labeled {label!r} should train {group!r}, but no gradient arrived. Look for "
                "a region whose output is dropped, or a batch without tokens that have a loss (all labels -100)")  # fmt: skip
    return received


def find_leaks(loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Run one backward pass in which all weights are 0, and return the names of parameters that receive gradient all the same.

    ``loss`` computes the loss under weights of 0, and is called once; where it is not finite, no names are returned. The
    random state is left as it was; gradients are the caller's to clear.
    """
    with _same_randomness():
        value = loss()
        if not bool(torch.isfinite(value.detach()).all()):
            return []
        value.backward()
    received = _received([p] for p in parameters.values())
    return [name for name, got in zip(parameters, received, strict=True) if got]


def check_leaks(names: Sequence[str]) -> None:
    """Raise ValueError where there are ``names`` of parameters that learn although all their weights are 0."""
    if names:
        raise ValueError(f"with all weights 0, gradient still reaches {_some(names)}. These are read outside their own "
            "module's forward (fused experts, a fused loss or a kernel that takes `weight`), so no route holds for them: "
            "freeze them, name their modules in `joint` if all data may train them, or switch the fused code off")  # fmt: skip


def nonzero_gradients(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of ``parameters`` whose gradient, in this process, has a finite entry other than zero."""
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    # a scaled loss may overflow, and 0 times infinity is no leak
    return [name for name, g in grads.items() if bool(g.nan_to_num(0.0, 0.0, 0.0).count_nonzero())]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _same_randomness() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield


def _received(groups: Iterable[Sequence[nn.Parameter]]) -> list[bool]:
    groups = list(groups)
    if not groups:
        return []
    grads = [[p.grad for p in parameters if p.grad is not None] for parameters in groups]
    local = [[g.to_local() if hasattr(g, "to_local") else g for g in of_group] for of_group in grads]
    found = [float(any(bool(g.count_nonzero()) for g in of_group)) for of_group in local]
    result = torch.tensor(found, device=groups[0][0].device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX)  # one shard may hold zeros only
    return [bool(value) for value in result.tolist()]
