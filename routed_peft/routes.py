"""Routes: the gradient weights and the ablated regions of each kind of data, with checks of a whole table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from routed_peft.mistakes import check_shape

BASE = "base"
"""Name of the group of all trained parameters outside every region."""

IGNORED = -100
"""Integer label of padding, whose positions train nothing."""

_RESERVED = ("default", BASE, "ref", "joint", "all", "none", "ablated")
_LONGEST = 64


@dataclass(frozen=True)
class Route:
    """The effect of one kind of data on the base and on each region.

    Attributes:
        weights: gradient weight by name (``"base"`` or a region): 1 passes, 0 blocks, a negative weight reverses. A name
            left out has weight 1, so ``Route()`` is ordinary training.
        ablated: regions that are absent from this data's forward pass, and therefore learn nothing from it.

    Raises:
        ValueError: on a weight that is not finite, a string in place of a tuple, or an ablated base.

    >>> Route(weights={"base": 0.0}).weight("base"), Route(ablated=("forget",)).weight("forget")
    (0.0, 0.0)
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    ablated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ablated, str):
            raise ValueError(f"`ablated` is a tuple of region names, got the string {self.ablated!r}: write "
                             f'("{self.ablated}",)')  # fmt: skip
        object.__setattr__(self, "weights", {name: float(w) for name, w in self.weights.items()})
        object.__setattr__(self, "ablated", tuple(self.ablated))
        if bad := {name: w for name, w in self.weights.items() if not abs(w) < float("inf")}:
            raise ValueError(f"`weights` must be finite numbers, got {bad}")
        if BASE in self.ablated:
            raise ValueError("`ablated` names regions, got 'base', which always takes part: give it the weight 0 "
                             "instead")  # fmt: skip

    def weight(self, name: str) -> float:
        """Return the effective weight of ``name``: its weight, or 0 where the region is ablated."""
        return 0.0 if name in self.ablated else self.weights.get(name, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"weights": dict(self.weights), "ablated": list(self.ablated)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Route:
        """Return the route of `to_dict`'s data; ValueError on an unknown key."""
        if unknown := set(data) - {"weights", "ablated"}:
            raise ValueError(f"a route has the keys `weights` and `ablated`, got {sorted(unknown)}, too: remove these")
        return cls(data.get("weights") or {}, tuple(data.get("ablated") or ()))


Routes = Mapping[str, Route]
"""Label -> route. The order of the labels gives the integer labels of tensors."""


def routes_to_dict(routes: Routes) -> dict[str, Any]:
    """Return routes as plain data for JSON, in their order."""
    return {label: route.to_dict() for label, route in routes.items()}


def routes_from_dict(data: Mapping[str, Any]) -> dict[str, Route]:
    """Return the routes of `routes_to_dict`'s data."""
    check_shape(data, {str: {"weights?": {str: int | float}, "ablated?": [str]}}, "routes")
    return {label: Route.from_dict(route) for label, route in data.items()}


def routes_differ(before: Routes, now: Routes) -> list[str]:
    """Return how two tables of routes differ in what data does, one text per label; their order does not matter.

    >>> routes_differ({"a": Route()}, {"a": Route({"base": 0})})
    ["'a' was Route(weights={}, ablated=()) and is Route(weights={'base': 0.0}, ablated=())"]
    """
    texts = []
    for label in dict.fromkeys([*before, *now]):
        old, new = before.get(label), now.get(label)
        if old is None or new is None:
            texts.append(f"{label!r} had no route and is {new}" if new else f"{label!r} was {old} and has no route")
        elif set(old.ablated) != set(new.ablated) or any(
            old.weight(name) != new.weight(name) for name in {*old.weights, *new.weights}
        ):
            texts.append(f"{label!r} was {old} and is {new}")
    return texts


def check_region_name(name: str) -> None:
    """Raise ValueError where ``name`` cannot be that of a region or base adapter, which is also the name of its folder."""
    plain = isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name) and len(name.encode()) <= _LONGEST
    if not plain or name.lower() in _RESERVED or name.startswith("checkpoint-"):
        raise ValueError(f"a region cannot be called {name!r}: a name has letters, digits, `_` and `-`, {_LONGEST} "
                         f"bytes at most, and {', '.join(_RESERVED)} and checkpoint-… have other meanings in PEFT, "
                         'TRL, Trainer and here. Pick another `adapter_name`, such as "forget".')  # fmt: skip


def named_in(routes: Routes) -> set[str]:
    """Return the names that occur in the weights or the ablated regions of any route.

    >>> sorted(named_in({"forget": Route(weights={"base": 0.0}), "retain": Route(ablated=("bio",))}))
    ['base', 'bio']
    """
    return {name for route in routes.values() for name in (*route.weights, *route.ablated)}


def validate_routes(routes: Routes, regions: Iterable[str], *, base: bool = True, frozen: Collection[str] = ()) -> None:
    """Check ``routes`` against the ``regions`` of a model.

    A region is named by a route if it occurs in its weights or among its ablated regions. Where there are several regions
    and routes differ from ordinary training, all regions must be named: one that was left out by mistake, such as a
    ``retain`` adapter that belongs to the base, would learn from all data and go with the regions.

    Args:
        routes: label -> `Route`.
        regions: names of the model's regions.
        base: whether anything outside the regions is trained.
        frozen: regions that are not trained.

    Raises:
        ValueError: on an empty table, a label that is not a string, an unknown region, a region that no route names or
            trains, a route that trains nothing, or one that names the base where none is trained.
    """
    regions = list(regions)
    if not routes:
        raise ValueError('`routes` is empty: give one route per label, for example `presets.sgtm("forget")`')
    trained = [name for name in regions if name not in frozen] + [BASE] * base
    for label, route in routes.items():
        if not isinstance(label, str) or not isinstance(route, Route):
            raise ValueError(f"`routes` maps a label (str) to a Route, got {label!r}: {route!r}")
        if unknown := [name for name in (*route.weights, *route.ablated) if name not in (BASE, *regions)]:
            raise ValueError(f"the route of label {label!r} names {unknown[0]!r}; this model has 'base' and the regions "
                             f"{regions}")  # fmt: skip
        if not any(route.weight(name) for name in trained):
            raise ValueError(
                f"the route of label {label!r} blocks everything: no trained group among {trained} has a weight other than "
                "zero. Leave such rows out of the data, or train the base (`train_base=True` or `base_adapters`)"
                + (f", or load the frozen {list(frozen)} with `is_trainable=True`." if frozen else ".")
            )
    _check_named(routes, regions, base=base)
    for region in regions:
        # on purpose, as in `presets.inoculation`
        rests = all(route.weights.get(region) == 0 for route in routes.values())
        if region not in frozen and not rests and not any(route.weight(region) for route in routes.values()):
            raise ValueError(f"no route trains the region {region!r}: in {list(routes)} its weight is 0 or it is "
                             "ablated. Let one of them train it, or name it in `base_adapters`")  # fmt: skip


def _check_named(routes: Routes, regions: Sequence[str], *, base: bool) -> None:
    named = named_in(routes)
    nameless = [name for name in regions if name not in named]
    plain = all(route == Route(dict.fromkeys(route.weights, 1.0)) for route in routes.values())
    if nameless and len(regions) > 1 and not plain:
        stay = nameless if len(nameless) < len(regions) else ["retain"]
        raise ValueError(f"no route names {nameless} of the adapters {regions}, so they would learn from all data and "
                         "be ablated with the regions: name those that stay with the base, as in "
                         f"`base_adapters={stay}`, and a region that does learn from all data in a route, as in "
                         f"`Route(weights={{{nameless[0]!r}: 1.0}})`")  # fmt: skip
    if BASE in named and not base:
        labels = [label for label, route in routes.items() if BASE in route.weights]
        raise ValueError(f"the routes of {labels} name 'base', but no base is trained: all adapters, {regions}, are "
                         "regions, and the model's own weights are frozen. Say `train_base=True`, or name the adapters "
                         'that stay in `base_adapters`, as in `base_adapters=["retain"]`')  # fmt: skip
