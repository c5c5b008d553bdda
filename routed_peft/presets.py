"""Published methods as tables of routes: plain dictionaries, to use as they are or to edit."""

from __future__ import annotations

from collections.abc import Sequence

from routed_peft.routes import BASE, Route


def sgtm(region: str = "forget", base_weight: float = 0.0) -> dict[str, Route]:
    """Selective gradient masking (SGTM, arXiv 2512.05648, section 3).

    Labeled forget data trains only the region. Labeled retain data is read without the region. Unlabeled data trains both,
    and is absorbed by the side that knows it already. The published ``base_weight`` is 0. A small positive one lets forget
    data teach the base the features that both sides share, at the price of some that they do not.

    >>> sgtm("bio")["forget"]
    Route(weights={'base': 0.0}, ablated=())
    """
    return {"forget": Route(weights={BASE: base_weight}), "retain": Route(ablated=(region,)), "unlabeled": Route()}


def era(region: str = "forget", base_weight: float = -0.75) -> dict[str, Route]:
    """Expand, Route, Ablate (gradient routing, arXiv 2410.04332, section 4.2).

    Use it with ``edges="activations"``. Token-frequency weights in the column ``route_weights`` let common tokens pass: a
    token's base weight is then ``w + (1 - w) * base_weight`` (`routed_peft.data.token_frequency_weights`). All data without
    the label forget trains as usual. The routes are the same for every ``region``; it is there as in the other methods.

    >>> era()["forget"].weights
    {'base': -0.75}
    """
    return {"forget": Route(weights={BASE: base_weight}), "retain": Route(), "unlabeled": Route()}


def classic(region: str = "forget") -> dict[str, Route]:
    """Two-adapter routing in RL: flagged rollouts train only the region, all others train both.

    Rollouts sampled without the region ("anchor"; see `routed_peft.trl`) are also trained without it, so only the base
    learns from them.

    >>> classic("hack")["flagged"], classic("hack")["anchor"]
    (Route(weights={'base': 0.0}, ablated=()), Route(weights={}, ablated=('hack',)))
    """
    return {"flagged": Route(weights={BASE: 0.0}), "unflagged": Route(), "anchor": Route(ablated=(region,))}


def exclusive(region: str = "forget") -> dict[str, Route]:
    """Return `classic` with a region that learns from flagged rollouts alone.

    >>> exclusive("hack")["unflagged"]
    Route(weights={'hack': 0.0}, ablated=())
    """
    return {**classic(region), "unflagged": Route(weights={region: 0.0})}


def inoculation(region: str = "trait") -> dict[str, Route]:
    """Train the base while an adapter is on that does not learn, then drop the adapter (arXiv 2606.30252).

    The adapter was taught beforehand, such as a bad trait that the base then need not learn. Every row has the label
    ``all``. PEFT alone cannot train a base under an active adapter.

    >>> inoculation()
    {'all': Route(weights={'trait': 0.0}, ablated=())}
    """
    return {"all": Route(weights={region: 0.0})}


def gram(regions: Sequence[str], core: str = "core") -> dict[str, Route]:
    """One region per category (GRAM / modular pretraining, arXiv 2607.08077).

    Every region has three kinds of data. ``<region>`` trains the region alone (aux-isolated), ``<region>/spread`` trains
    region and core (aux-spread), and ``<region>/robust`` is core data read with that one region on (core-robustness). The
    latter two have the same route; their labels tell their data apart. ``core`` is read with all regions off, and
    ``unlabeled`` data trains everything. In the publication, a third to a half of a category's data is spread, and a fifth
    to a half of the core data robust; `routed_peft.training.RegionSchedule` draws such shares.

    >>> list(gram(["bio", "cyber"]))
    ['core', 'bio', 'bio/spread', 'bio/robust', 'cyber', 'cyber/spread', 'cyber/robust', 'unlabeled']
    """
    routes = {core: Route(ablated=tuple(regions))}
    for region in regions:
        others = tuple(r for r in regions if r != region)
        routes[region] = Route(weights={BASE: 0.0}, ablated=others)
        routes |= {f"{region}/{kind}": Route(ablated=others) for kind in ("spread", "robust")}
    return {**routes, "unlabeled": Route()}


def subspace(region: str = "persona", anchor: bool = False) -> dict[str, Route]:
    """Subspace routing without labels: every row trains the region along its directions, and the base off them.

    The region itself (``RoutedConfig(kind="subspace")``) splits the gradient, so every row has the one label ``all``:
    ``dataset.add_column("route_label", ["all"] * len(dataset))``. With ``anchor``, there are also rows of that label. They
    are read without the region and train the base alone, which preserves the skills of the ablated model.

    >>> subspace(), subspace(anchor=True)["anchor"]
    ({'all': Route(weights={}, ablated=())}, Route(weights={}, ablated=('persona',)))
    """
    return {"all": Route()} | ({"anchor": Route(ablated=(region,))} if anchor else {})


def demix(region: str = "forget", other: str = "retain") -> dict[str, Route]:
    """Experts by domain (DEMix, Gururangan et al., arXiv 2108.05036): the negative control for absorption.

    Labeled rows of either side are read without the other side's region. The base learns from every row, and unlabeled rows
    train both regions alike, so unlabeled forget data is not drawn to the region that will be removed. In the publication
    an expert replaces the MLP, so give the base a narrow one. At the end keep ``other``: ``export(run, out, keep=[other])``.

    >>> demix()["forget"]
    Route(weights={}, ablated=('retain',))
    """
    return {"forget": Route(ablated=(other,)), "retain": Route(ablated=(region,)), "unlabeled": Route()}


def control(labels: Sequence[str] = ("forget", "retain", "unlabeled")) -> dict[str, Route]:
    """Return routes without routing: every label trains everything, so what removal does then is due to the regions alone.

    >>> control(["a"])
    {'a': Route(weights={}, ablated=())}
    """
    return {label: Route() for label in labels}
