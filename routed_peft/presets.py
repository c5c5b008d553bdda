"""The published methods as tables of routes: plain dictionaries, to be used as they are or edited."""

from __future__ import annotations

from collections.abc import Sequence

from routed_peft.routes import BASE, Route


def sgtm(region: str = "forget", base_weight: float = 0.0) -> dict[str, Route]:
    """Selective gradient masking (SGTM, arXiv 2512.05648, section 3).

    Labeled forget data trains only the region; labeled retain data is seen without the region; the rest trains both,
    and is absorbed by whichever side already knows it. As published, ``base_weight`` is 0; a little more lets forget data
    teach the base what both sides share, at the price of a little of what they do not.

    >>> sgtm("bio")["forget"]
    Route(weights={'base': 0.0}, ablated=())
    """
    return {
        "forget": Route(weights={BASE: base_weight}),
        "retain": Route(ablated=(region,)),
        "unlabeled": Route(),
    }


def era(region: str = "forget", base_weight: float = -0.75) -> dict[str, Route]:
    """Expand, Route, Ablate (gradient routing, arXiv 2410.04332, section 4.2).

    Use it with ``edges="activations"``, and with token-frequency weights in ``route_weights`` to let common tokens pass:
    a token's base weight is then ``w + (1 - w) * base_weight`` (`routed_peft.data.token_frequency_weights`). Everything
    that is not labeled forget trains as usual.

    >>> era()["forget"].weights
    {'base': -0.75}
    """
    return {
        "forget": Route(weights={BASE: base_weight}),
        "retain": Route(),
        "unlabeled": Route(),
    }


def classic(region: str = "forget") -> dict[str, Route]:
    """Two-adapter routing in RL: flagged rollouts train only the region, all others train both.

    Rollouts that were sampled without the region ("anchor"; see `routed_peft.trl`) train the base alone, likewise without.

    >>> classic("hack")["flagged"], classic("hack")["anchor"]
    (Route(weights={'base': 0.0}, ablated=()), Route(weights={}, ablated=('hack',)))
    """
    return {"flagged": Route(weights={BASE: 0.0}), "unflagged": Route(), "anchor": Route(ablated=(region,))}


def exclusive(region: str = "forget") -> dict[str, Route]:
    """As `classic`, but the region learns from flagged rollouts alone.

    >>> exclusive("hack")["unflagged"]
    Route(weights={'hack': 0.0}, ablated=())
    """
    return {**classic(region), "unflagged": Route(weights={region: 0.0})}


def gram(regions: Sequence[str]) -> dict[str, Route]:
    """One region per category (GRAM / modular pretraining, arXiv 2607.08077).

    For every region three kinds of data: ``<region>`` trains the region alone (aux-isolated), ``<region>/spread`` trains
    region and core (aux-spread), ``<region>/robust`` is core data seen with that one region on (core-robustness).
    ``core`` is seen with all regions off. The published shares: a third to a half of a category's data spread, a fifth to
    a half of the core data robust.

    >>> list(gram(["bio", "cyber"]))
    ['core', 'bio', 'bio/spread', 'bio/robust', 'cyber', 'cyber/spread', 'cyber/robust']
    """
    routes = {"core": Route(ablated=tuple(regions))}
    for region in regions:
        others = tuple(r for r in regions if r != region)
        routes[region] = Route(weights={BASE: 0.0}, ablated=others)
        routes[f"{region}/spread"] = Route(ablated=others)
        routes[f"{region}/robust"] = Route(ablated=others)
    return routes


def subspace(region: str = "persona", anchor: bool = False) -> dict[str, Route]:
    """Subspace routing: no label decides; every row trains the region along its directions, and the base off them.

    What goes where is settled by the region itself (``RoutedConfig(kind="subspace")``), so every row takes the one label
    ``all``: ``dataset.add_column("route_label", ["all"] * len(dataset))``. With ``anchor``, rows of that label are seen
    without the region and train the base alone, which keeps the ablated model good at what the whole model does.

    >>> subspace(), subspace(anchor=True)["anchor"]
    ({'all': Route(weights={}, ablated=())}, Route(weights={}, ablated=('persona',)))
    """
    return {"all": Route()} | ({"anchor": Route(ablated=(region,))} if anchor else {})


def demix(region: str = "forget", other: str = "retain") -> dict[str, Route]:
    """Experts by domain (DEMix, Gururangan et al., arXiv 2108.05036), as the negative control for absorption.

    Labeled rows of either side are seen, and learned, without the other side's region. All else learns from every row, and
    unlabeled rows teach both regions alike: nothing sends unlabeled forget data to the one that goes. In the publication an
    expert takes the whole place of the MLP, so give the base a narrow one. At the end, keep ``other``:
    ``export(run, out, keep=[other])``.

    >>> demix()["forget"]
    Route(weights={}, ablated=('retain',))
    """
    return {"forget": Route(ablated=(other,)), "retain": Route(ablated=(region,)), "unlabeled": Route()}


def control(labels: Sequence[str] = ("forget", "retain", "unlabeled")) -> dict[str, Route]:
    """The placebo: every label trains everything, in a model with the same regions.

    >>> control(["a"])
    {'a': Route(weights={}, ablated=())}
    """
    return {label: Route() for label in labels}
