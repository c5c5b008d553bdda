"""`RegionSchedule`: the settings with which one run trains a base and any number of regions that work when switched on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from routed_peft import presets
from routed_peft.data.labels import RETAIN, UNLABELED
from routed_peft.mistakes import check_numbers
from routed_peft.routes import BASE, IGNORED, Route, Routes, check_region_name


@dataclass(frozen=True)
class RegionSchedule:
    r"""Give it to `RoutedTrainer` in place of routes; rows are labeled by the name of their region, or ``core``.

    A row of a region trains that region alone, with the other regions off. A row of the core trains the base with all
    regions off. On top of this, each with a setting:

    *Consistency* makes regions silent outside their topic. For a few rows, a random set ``S`` of regions is switched on,
    and those of other topics learn to change nothing:

    .. math:: L = \lambda \, \mathrm{KL}\bigl(p_{S \cap \{t\}} \,\|\, p_S\bigr)

    with ``t`` the topic of the row; nothing else learns from it. *Robust* rows of the core are read with one region on, and
    train it and the base. *Spread* rows of a region train the base as well (GRAM, arXiv 2607.08077, section 3). In the
    *branch* at the end of a run the base rests. All draws follow from ``seed`` and the step, so a resumed run repeats them.

    Attributes:
        regions: names of the regions, which are the labels of their rows.
        core: label of all other rows.
        consistency: the factor λ; 0 for none.
        consistency_rows: rows for it, at most, in a batch of one process.
        consistency_every: micro-batches from one such pass to the next.
        robust: share of the core's rows that are robust.
        spread: share of a region's rows that are spread.
        branch: share of the run's steps that are the branch.
        rate: the regions' learning rate as a multiple of the base's, unless `region_learning_rate` is set.
        seed: of the draws.

    Raises:
        ValueError: on names that cannot be regions, and numbers out of range.

    >>> schedule = RegionSchedule(["bio", "cyber"])
    >>> list(schedule.routes())[:3], schedule.routes()["bio"]
    (['retain', 'bio', 'bio/spread'], Route(weights={'base': 0.0}, ablated=('cyber',)))
    """

    regions: Sequence[str]
    core: str = RETAIN
    consistency: float = 3.0
    consistency_rows: int = 2
    consistency_every: int = 2
    robust: float = 0.0
    spread: float = 0.0
    branch: float = 0.0
    rate: float = 4.0
    seed: int = 0
    _labels: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.regions, str) or not self.regions or len(set(self.regions)) < len(self.regions):
            raise ValueError(f'`regions` is a list of different names, got {self.regions!r}: write ["bio", "cyber"]')
        for name in self.regions:
            check_region_name(name)
        if self.core in self.regions or self.core == UNLABELED:
            raise ValueError(f"`core` is the label of rows outside all regions, got {self.core!r}: choose another")
        check_numbers(self, "consistency", "seed")
        check_numbers(self, "consistency_rows", "consistency_every", low=1)
        check_numbers(self, "robust", "spread", "branch", high=1)
        check_numbers(self, "rate", low=1e-9)
        object.__setattr__(self, "regions", tuple(self.regions))
        object.__setattr__(self, "_labels", list(self.routes()))

    def routes(self) -> dict[str, Route]:
        """Return the routes of all labels, those that are drawn included."""
        routes = presets.gram(self.regions, self.core)
        for region in self.regions:
            others = tuple(name for name in self.regions if name != region)
            routes[f"{region}/branch"] = Route(weights={BASE: 0.0}, ablated=others)
        return routes

    @staticmethod
    def routes_of(routes: Routes | RegionSchedule) -> Routes:
        """Return the routes of a schedule; routes as they are."""
        return routes.routes() if isinstance(routes, RegionSchedule) else routes

    def draw(self, labels: Tensor, *, step: int, steps: int, moment: Sequence[int] = ()) -> Tensor:
        """Return the labels under which a batch is trained, of the ``labels`` that it came with.

        Args:
            labels: integers ``(B,)`` into ``list(routes())``; those of tokens, ``(B, T)``, stay as they are.
            step: optimizer steps done.
            steps: of the whole run.
            moment: further numbers of this micro-batch, such as its place in the step and the process.

        >>> schedule = RegionSchedule(["bio"], robust=1.0)
        >>> [schedule._labels[i] for i in schedule.draw(torch.tensor([0, 1]), step=0, steps=9)]
        ['bio/robust', 'bio']
        """
        if labels.dim() != 1:
            return labels
        generator = self._generator(0, step, *moment)
        luck = torch.rand(len(labels), generator=generator)
        choice = torch.randint(len(self.regions), (len(labels),), generator=generator)
        at_end = step >= steps - round(self.branch * steps) if self.branch else False
        drawn = labels.clone()
        for i, name in enumerate(self._labels[label] if label >= 0 else "" for label in labels.tolist()):
            one = self.regions[int(choice[i])]
            if name == self.core and at_end:
                drawn[i] = self._labels.index(f"{one}/branch")
            elif name == UNLABELED and at_end:
                drawn[i] = IGNORED
            elif name == self.core and luck[i] < self.robust:
                drawn[i] = self._labels.index(f"{one}/robust")
            elif name in self.regions and luck[i] < self.spread and not at_end:
                drawn[i] = self._labels.index(f"{name}/spread")
        return drawn

    def draw_consistency(self, labels: Tensor, *, step: int, moment: Sequence[int] = ()) -> ConsistencyRows | None:
        """Return the rows of a batch for the consistency pass and their sets of regions; None where there are none.

        ``labels`` are those that the batch came with; the other arguments are those of `draw`.
        """
        if not self.consistency or labels.dim() != 1:
            return None
        topics = [self._labels[label] if label >= 0 else "" for label in labels.tolist()]
        several = len(self.regions) > 1
        able = [i for i, name in enumerate(topics) if name == self.core or (several and name in self.regions)]
        if not able:
            return None
        generator = self._generator(1, step, *moment)
        rows = [able[i] for i in torch.randperm(len(able), generator=generator)[: self.consistency_rows].tolist()]
        own = torch.tensor([[topics[i] == region for region in self.regions] for i in rows])
        on = torch.rand(own.shape, generator=generator) < 0.5
        for row in range(len(rows)):  # at least one region of another topic
            strangers = (~own[row]).nonzero().squeeze(1)
            if not (on[row] & ~own[row]).any():
                on[row, strangers[int(torch.randint(len(strangers), (), generator=generator))]] = True
        return ConsistencyRows(torch.tensor(rows), on, own)

    def _generator(self, *numbers: int) -> torch.Generator:
        seed = 0
        for number in (self.seed, *numbers):
            seed = (seed * 1_000_003 + int(number) + 1) % 2**63
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class ConsistencyRows:
    """Rows for a consistency pass.

    Attributes:
        rows: indices into the batch, ``(K,)``.
        on: bool ``(K, N)``: the regions that are switched on.
        own: bool ``(K, N)``: the region of the row's own topic, if it has one.
    """

    rows: Tensor
    on: Tensor
    own: Tensor

    @classmethod
    def none(cls, regions: int) -> ConsistencyRows:
        """Return a row without any region, from which none learns, for a process that has no row to draw."""
        off = torch.zeros(1, regions, dtype=torch.bool)
        return cls(torch.zeros(1, dtype=torch.long), off, off)

    def present(self, regions: Sequence[str], *, target: bool) -> dict[str, Tensor]:
        """Return by region the rows ``(K,)`` in which it takes part: in the target, only in those of its own topic."""
        on = self.on & self.own if target else self.on
        return {region: on[:, i] for i, region in enumerate(regions)}

    def weights(self, regions: Sequence[str]) -> dict[str, Tensor]:
        """Return by region its gradient weights ``(K,)``: 1 where it is on and the topic is another."""
        return {region: (self.on & ~self.own)[:, i].float() for i, region in enumerate(regions)}
