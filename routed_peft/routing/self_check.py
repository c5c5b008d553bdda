"""Checks on a real batch that gradient arrives where the routes say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from routed_peft.architectures import find_mlps, output_projection
from routed_peft.functional import PositionWeights
from routed_peft.routes import BASE, Route, Routes, named_in, routes_differ
from routed_peft.routing.groups import JOINT
from routed_peft.routing.step_weights import GroupWeights, RouteTable, RoutingState


class SelfChecking:
    """The part of `GradientRouting` that checks itself; its attributes are described there."""

    model: nn.Module
    routes: Routes
    regions: list[str]
    groups: list[str]
    edges: str
    parameters: Callable[[str], list[nn.Parameter]]
    check_adapters: Callable[[], None]
    __call__: Callable[..., AbstractContextManager[None]]
    _state: RoutingState
    _table: RouteTable
    _unproven: set[str]
    _swapped: list[nn.Module]

    def self_check(
        self, batch: Mapping[str, Any], loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    ) -> dict[str, dict[str, bool]]:
        """Check, by one backward pass per label on a real batch, that gradient arrives where the routes say.

        Args:
            batch: keyword arguments of the model, without route columns. Gradients held before the call are lost.
            loss: ``loss(model, batch)``; the model's own ``.loss`` by default.

        Returns:
            label -> group -> whether the group received gradient.

        Raises:
            ValueError: when a group of weight zero received gradient, or one that should learn received none; and when a
                parameter has gradient although all weights are 0.
        """
        size = next(len(v) for v in batch.values() if isinstance(v, Tensor))
        groups = {group: self.parameters(group) for group in self.groups if group != JOINT}
        if self.edges == "activations":
            groups = {BASE: self._upstream()}
        compute = loss or (lambda model, inputs: model(**inputs).loss)
        leaks: list[str] = []
        received: dict[str, dict[str, bool]] = {}
        self._unproven.clear()
        try:
            if any(group in named_in(self.routes) for group in groups):
                self.model.zero_grad()
                self.check_adapters()
                device = next(self.model.parameters()).device
                none = torch.zeros(size, dtype=self._table.dtype)
                zero = PositionWeights.from_weights(none, self._table.gather).to(device)
                with self._state.holding({group: GroupWeights(zero) for group in (BASE, *self.regions)}):
                    leaks = find_leaks(lambda: compute(self.model, batch), self._names(groups))
            for label, route in self.routes.items():
                twins = [name for name in received if not routes_differ({label: self.routes[name]}, {label: route})]
                if twins:  # labels that do the same are tried once
                    received[label] = received[twins[0]]
                    continue
                self.model.zero_grad()
                with self([label] * size):
                    received[label] = check_gradients(
                        lambda: compute(self.model, batch), label, route=route, groups=groups, leaks=leaks
                    )
        finally:  # of unchecked parameters too, or the first step would start from these gradients
            for p in self.model.parameters():
                p.grad = None
        check_leaks(leaks)
        return received

    @contextmanager
    def _proving(self, effective: Mapping[str, Tensor]) -> Iterator[None]:
        """Check, the first time that a block gives a group no weight at all, that it received no gradient."""
        blocked = [group for group in self._unproven if not effective[group].any()]
        if not blocked or any(p.grad is not None for group in blocked for p in self.parameters(group)):
            yield
            return
        yield
        parameters = self._names({group: self.parameters(group) for group in blocked})
        if any(p.grad is not None for p in parameters.values()):  # and not only a forward pass
            check_leaks(nonzero_gradients(parameters))
            self._unproven -= set(blocked)

    def _names(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, nn.Parameter]:
        chosen = {p for parameters in groups.values() for p in parameters}
        return {name: p for name, p in self.model.named_parameters() if p in chosen}

    def _upstream(self) -> list[nn.Parameter]:
        """Return the base parameters that activation edges protect: those of the MLPs, output projections excepted."""
        swapped, base = set(self._swapped), set(self.parameters(BASE))
        mlps = [mlp for mlp in find_mlps(self.model).values() if output_projection(mlp) in swapped]
        modules = [m for mlp in mlps for m in mlp.modules() if m not in swapped]
        return [p for m in modules for p in m.parameters(recurse=False) if p in base]


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
