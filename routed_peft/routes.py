"""Routes: the gradient weights and the ablated regions of each kind of data, with checks of a whole table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

BASE = "base"
"""Name of the group of all trained parameters outside every region."""

IGNORED = -100
"""Integer label of padding, whose positions train nothing."""


@dataclass(frozen=True)
class Route:
    """The effect of one kind of data on the base and on each region.

    Attributes:
        weights: gradient weight by name (``"base"`` or a region): 1 passes, 0 blocks, a negative weight reverses. A name
            left out has weight 1, so ``Route()`` is ordinary training.
        ablated: regions that are absent from this data's forward pass, and therefore learn nothing from it.

    Raises:
        ValueError: on a weight that is not finite, a string in place of a tuple, or an ablated base.

    Example:
        >>> Route(weights={"base": 0.0}).weight("base"), Route(ablated=("forget",)).weight("forget")
        (0.0, 0.0)
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    ablated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.ablated, str):
            raise ValueError(
                f'`ablated` is a tuple of region names, got the string {self.ablated!r}: write ("{self.ablated}",)'
            )
        object.__setattr__(self, "weights", {name: float(w) for name, w in self.weights.items()})
        object.__setattr__(self, "ablated", tuple(self.ablated))
        bad = {name: w for name, w in self.weights.items() if not abs(w) < float("inf")}
        if bad:
            raise ValueError(f"`weights` must be finite numbers, got {bad}")
        if BASE in self.ablated:
            raise ValueError(
                "`ablated` names regions, got 'base', which always takes part: give it the weight 0 instead"
            )

    def weight(self, name: str) -> float:
        """Return the effective weight of ``name``: its weight, or 0 where the region is ablated."""
        return 0.0 if name in self.ablated else self.weights.get(name, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON.

        >>> Route(ablated=("forget",)).to_dict()
        {'weights': {}, 'ablated': ['forget']}
        """
        return {"weights": dict(self.weights), "ablated": list(self.ablated)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Route:
        """Return the route of `to_dict`'s data; ValueError on an unknown key.

        >>> Route.from_dict({"weights": {"base": 0}})
        Route(weights={'base': 0.0}, ablated=())
        """
        unknown = set(data) - {"weights", "ablated"}
        if unknown:
            raise ValueError(f"a route has the keys `weights` and `ablated`, got {sorted(unknown)}, too: remove these")
        return cls(data.get("weights", {}), tuple(data.get("ablated", ())))


Routes = Mapping[str, Route]
"""Label -> route. The order of the labels gives the integer labels of tensors."""


def routes_to_dict(routes: Routes) -> dict[str, Any]:
    """Return routes as plain data for JSON, in their order."""
    return {label: route.to_dict() for label, route in routes.items()}


def routes_from_dict(data: Mapping[str, Any]) -> dict[str, Route]:
    """Return the routes of `routes_to_dict`'s data.

    >>> routes_from_dict({"retain": {"ablated": ["forget"]}})
    {'retain': Route(weights={}, ablated=('forget',))}
    """
    return {label: Route.from_dict(route) for label, route in data.items()}


def check_region_name(name: str) -> None:
    """Raise ValueError where ``name`` has a meaning of its own in PEFT, TRL or Trainer.

    >>> check_region_name("default")
    Traceback (most recent call last):
    ...
    ValueError: a region cannot be called 'default': ... Pick another `adapter_name`, such as "forget".
    """
    if name in ("default", BASE, "ref") or name.startswith("checkpoint-") or "." in name or not name:
        raise ValueError(
            f"a region cannot be called {name!r}: `default`, `base`, `ref`, `checkpoint-…` and names with dots have other "
            'meanings in PEFT, TRL and Trainer. Pick another `adapter_name`, such as "forget".'
        )


def validate_routes(routes: Routes, regions: Iterable[str], base: bool = True) -> None:
    """Check ``routes`` against the ``regions`` of a model.

    Args:
        routes: label -> `Route`.
        regions: names of the model's regions.
        base: whether anything outside the regions is trained.

    Raises:
        ValueError: on an empty table, a label that is not a string, an unknown region, a region that no route trains, or
            a route that trains nothing.

    Example:
        >>> validate_routes({"forget": Route(weights={"bsae": 0.0})}, ["forget"])
        Traceback (most recent call last):
        ...
        ValueError: the route of label 'forget' names 'bsae'; this model has 'base' and the regions ['forget']
    """
    regions = list(regions)
    if not routes:
        raise ValueError('`routes` is empty: give one route per label, for example `presets.sgtm("forget")`')
    for label, route in routes.items():
        if not isinstance(label, str) or not isinstance(route, Route):
            raise ValueError(f"`routes` maps a label (str) to a Route, got {label!r}: {route!r}")
        for name in (*route.weights, *route.ablated):
            if name != BASE and name not in regions:
                raise ValueError(
                    f"the route of label {label!r} names {name!r}; this model has 'base' and the regions {regions}"
                )
        names = regions + [BASE] * base
        if not any(route.weight(name) for name in names):
            raise ValueError(
                f"the route of label {label!r} blocks everything: no trained group among {names} has a weight other than "
                "zero. Leave such rows out of the data, or train the base (`train_base=True` or `base_adapters`)."
            )
    for region in regions:
        if not any(route.weight(region) for route in routes.values()):
            raise ValueError(
                f"no route trains the region {region!r}: in {list(routes)} its weight is 0 or it is ablated. Let one of them "
                "train it, or name it in `base_adapters`"
            )
