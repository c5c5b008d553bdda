"""A page about checkpoints that were attacked by ``routed-peft relearn``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from routed_peft.files import write_bytes
from routed_peft.report.attacks import Relearning, from_summary
from routed_peft.report.drawing import LIGHT, OTHERS, Draw, Line, curve, plot, render
from routed_peft.report.page import environment, picture
from routed_peft.report.reading import Source, read_sources

PAGE, FIGURES, TEMPLATE = "report.html", "figures", "checkpoints.html.jinja"
ENVELOPE = (
    "Forget loss that an attacker reaches by fine-tuning: at every step the lowest over all learning rates and earlier steps, "
    "mean over seeds. Bands: lowest to highest seed. The step axis is log(1 + step). Dotted, where it is known and the same "
    "for all: the loss of the model that was never unlearned."
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that was attacked by ``routed-peft relearn``."""

    source: Source

    @cached_property
    def attacks(self) -> dict[str, Relearning]:
        """Results by the name of the attack."""
        return {name: from_summary(result) for name, result in self.source.summary["attacks"].items()}

    @property
    def caveats(self) -> list[str]:
        """Doubts that the results themselves tell of: no loss was lowered, or the best rate is at the edge of a grid."""
        return [
            f"“{name}” lowered no loss ({one.verdict}): that is no robustness."
            if not one.attacked
            else f"“{name}”: the best learning rate lies at the edge of those tried."
            for name, one in self.attacks.items()
            if not (one.attacked and one.interior)
        ]


@dataclass(frozen=True)
class Report:
    """Result of `write_report`: the file, and the checkpoints that it shows."""

    page: Path
    checkpoints: Sequence[Checkpoint]


def write_report(places: Sequence[str | Path], out: str | Path) -> Report:
    """Draw figures and write a page about checkpoints that were attacked.

    Args:
        places: files that ``routed-peft relearn`` wrote, and directories of them (see `read_sources`).
        out: directory, for ``report.html`` and ``figures/`` (PNG and SVG). Files of these names there are replaced.
    """
    checkpoints = [Checkpoint(source) for source in read_sources(places)]
    content = environment().get_template(TEMPLATE).render(page_values(checkpoints))
    folder = Path(out)
    write_figures(folder / FIGURES, {"relearn": [checkpoint_figure(checkpoints)]})
    write_bytes(folder / PAGE, content.encode())
    return Report(folder / PAGE, checkpoints)


def page_values(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return the values that ``attacked.html.jinja`` needs."""
    return {
        "checkpoints": checkpoints,
        "attacked": checkpoint_figure(checkpoints),
        "areas": any(attack.area for one in checkpoints for attack in one.attacks.values()),
        "pictures": lambda figure: [(picture([panel.draw], panel.caption), panel.folded) for panel in figure.panels],
    }


def write_figures(folder: Path, figures: Mapping[str, Iterable[Figure]]) -> None:
    """Write figures as PNG and SVG, their names beginning with the keys of ``figures``; those without panels are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in ((name, one) for name, own in figures.items() for one in own if one.panels):
        for format in ("png", "svg"):
            content = render([panel.draw for panel in figure.panels], LIGHT, format=format)
            write_bytes(folder / f"{name}-{figure.key}.{format}", content)


@dataclass(frozen=True)
class Panel:
    """One plot with its caption; ``folded`` where a page should not show it at once."""

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


def checkpoint_figure(checkpoints: Sequence[Checkpoint]) -> Figure:
    """Return relearning curves of single checkpoints, a panel for every attack."""
    sources = {one.source.name: one.attacks for one in checkpoints}
    styles = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(sources)}
    panels = []
    for attack in dict.fromkeys(attack for attacks in sources.values() for attack in attacks):
        own = {name: attacks[attack] for name, attacks in sources.items() if attack in attacks}
        lines = [curve(name, one, styles[name]) for name, one in own.items()]
        panels += attack_panel(lines, own, attack=attack, level=common_reference(own.values()))
    return Figure("checkpoints", "Checkpoints under attack", ENVELOPE, panels)


def attack_panel(
    lines: Sequence[Line],
    own: Mapping[str, Relearning],
    *,
    attack: str,
    about: str = "",
    level: float | None = None,
    ideal: float | None = None,
    folded: bool = False,
) -> list[Panel]:
    """Return the panel of one attack, or nothing where it was measured at one step alone.

    ``own`` maps names to the attack, for the axis of steps; ``about`` ends title and caption; ``level``, ``ideal``: see `plot`.
    """
    steps = max((one.steps for one in own.values()), key=len, default=())
    if len(steps) < 2:
        return []
    ticks = {math.log1p(step): f"{step}" for step in steps}
    title = f"Attack “{attack}”{about}"
    draw = plot(lines, title, x_label="steps of the attack", ticks=ticks, ideal=ideal, level=level)
    return [Panel(draw, f"Forget loss under the attack “{attack}”{about}.", folded)]


def common_reference(attacks: Iterable[Relearning]) -> float | None:
    """Return the loss of the model that was never unlearned, where it is known and the same for all."""
    known = {one.reference for one in attacks if one.reference is not None}
    return known.pop() if len(known) == 1 else None
