"""Checkpoints that were attacked by ``routed-peft relearn``: a page about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from routed_peft.report.attacks import Relearning, of_summary
from routed_peft.report.drawing import Draw, Line
from routed_peft.report.lines import OTHERS, curve, plot
from routed_peft.report.reading import Source

ENVELOPE = (
    "Forget loss that an attacker reaches by fine-tuning: at every step the lowest over all learning rates and earlier steps, "
    "mean over seeds. Bands: lowest to highest seed. The step axis is log(1 + step). Dotted, where it is known and the same "
    "for all: the loss of the model that was never unlearnt."
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was attacked by ``routed-peft relearn``."""

    source: Source

    @cached_property
    def attacks(self) -> dict[str, Relearning]:
        """What each attack brought back."""
        return {name: of_summary(result) for name, result in self.source.summary["attacks"].items()}

    @property
    def caveats(self) -> list[str]:
        """What they leave open."""
        return list(caveats_of_attacks(self.attacks))


def caveats_of_attacks(attacks: Mapping[str, Relearning]) -> Iterator[str]:
    """Yield what the attacks on one checkpoint leave open."""
    for name, one in attacks.items():
        if not one.attacked:
            yield f"“{name}” lowered no loss ({one.verdict}): that is no robustness."
        elif not one.interior:
            yield f"“{name}”: the best learning rate lies at the edge of those tried."


@dataclass(frozen=True)
class Panel:
    """One plot, with what it shows; ``folded`` where a page should not show it at once."""

    draw: Draw
    caption: str
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels that belong together; ``key`` is for file names."""

    key: str
    title: str
    about: str
    panels: Sequence[Panel]


def checkpoint_figure(sources: Mapping[str, Mapping[str, Relearning]]) -> Figure:
    """Return relearning curves of single checkpoints, a panel for every attack.

    Args:
        sources: name of the checkpoint -> name of the attack -> what came of it.
    """
    styles = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(sources)}
    panels = []
    for attack in dict.fromkeys(attack for attacks in sources.values() for attack in attacks):
        own = {name: attacks[attack] for name, attacks in sources.items() if attack in attacks}
        lines = [curve(name, one, styles[name]) for name, one in own.items()]
        panels += attack_panel(lines, own, attack, level=common_reference(own.values()))
    return Figure("checkpoints", "Checkpoints under attack", ENVELOPE, panels)


def attack_panel(
    lines: Sequence[Line],
    own: Mapping[str, Relearning],
    attack: str,
    *,
    about: str = "",
    level: float | None = None,
    ideal: float | None = None,
    folded: bool = False,
) -> list[Panel]:
    """Return the panel of one attack, or nothing where it was measured at one step alone.

    Args:
        lines: to draw.
        own: name -> the attack on it, for the axis of steps.
        attack: its name.
        about: the end of title and caption.
        level: where a dotted line goes.
        ideal: highest loss of the perfect filter; the plot ends not far above it.
        folded: whether a page should not show it at once.
    """
    steps = max((one.steps for one in own.values()), key=len, default=())
    if len(steps) < 2:
        return []
    ticks = {math.log1p(step): f"{step}" for step in steps}
    title = f"Attack “{attack}”{about}"
    draw = plot(lines, title, "steps of the attack", ticks, ideal=ideal, level=level)
    return [Panel(draw, f"Forget loss under the attack “{attack}”{about}.", folded)]


def common_reference(attacks: Iterable[Relearning]) -> float | None:
    """Return the loss of the model that was never unlearnt, where it is known and the same for all."""
    known = {one.reference for one in attacks if one.reference is not None}
    return known.pop() if len(known) == 1 else None
