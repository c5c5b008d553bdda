"""The report itself: one page that needs nothing else, its figures beside it, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from experiments.report.figures import after_worst
from experiments.report.reading import read_sources
from experiments.report.sections import Section
from experiments.report.verdicts import edge, ends
from routed_peft.files import write_bytes
from routed_peft.report.checkpoints import Checkpoint, Figure, checkpoint_figure
from routed_peft.report.drawing import LIGHT, render
from routed_peft.report.page import environment, number, picture, place, share

PAGE, FIGURES, TEMPLATE = "report.html", "figures", "experiments.html.jinja"


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote: the page, and what is on it."""

    page: Path
    sections: Sequence[Section]
    checkpoints: Sequence[Checkpoint]


def write_report(places: Sequence[str | Path], out: str | Path) -> Report:
    """Draw figures and write a page about summaries.

    Args:
        places: what `experiments.report.reading.read_sources` takes: files, and directories of files.
        out: directory, for ``report.html`` and ``figures/``: PNG and SVG, whose names begin with that of the summary. What
            is there by these names is replaced.

    Raises:
        ValueError: what `read_sources` raises; nothing is written then.
    """
    sources = read_sources(places)
    sections = [Section(source) for source in sources if not source.relearning]
    checkpoints = [Checkpoint(source) for source in sources if source.relearning]
    drawn: dict[str, list[Figure]] = {section.source.name: section.figures for section in sections}
    attacked = checkpoint_figure({one.source.name: one.attacks for one in checkpoints})
    cards = [section.card(result) for section in sections for group in section.groups for result in group.results]
    templates = environment()
    templates.filters |= {"ends": ends, "edge": edge}
    content = templates.get_template(TEMPLATE).render(
        sections=sections,
        checkpoints=checkpoints,
        attacked=attacked,
        areas=any(attack.area for one in checkpoints for attack in one.attacks.values()),
        cards=list({card.name: card for card in cards}.values()),
        pictures=lambda figure: [(picture([panel.draw], panel.caption), panel.folded) for panel in figure.panels],
    )
    folder = Path(out)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, figure in [*((name, one) for name, own in drawn.items() for one in own), ("relearn", attacked)]:
        for format in ("png", "svg") if figure.panels else ():
            file = folder / FIGURES / f"{name}-{figure.key}.{format}"
            write_bytes(file, render([panel.draw for panel in figure.panels], LIGHT, format))
    write_bytes(folder / PAGE, content.encode())
    return Report(folder / PAGE, sections, checkpoints)


def verdict_tables(section: Section) -> Iterator[Table]:
    """Yield an experiment as tables for the terminal, one for each share and quality of labels."""
    for group in section.groups:
        title = ", ".join(filter(None, [section.title, group.about]))
        table = Table(
            title=title,
            caption="means over seeds, nats per token; over: perfect filter’s retain loss",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        uneven = len({len(result.cells) for result in group.results}) > 1
        for name in ("", "forget", "retain", "way", "tax", "over", "after", "steps", *(["seeds"] if uneven else [])):
            table.add_column(name, justify="right" if name else "left", no_wrap=not name)
        for result in group.results:
            after, worst = after_worst(result), result.worst
            table.add_row(
                section.card(result).label,
                number(result.forget.mean),
                number(result.retain.mean),
                share(result.way.mean) if result.way else "–",
                number(result.tax.mean) if result.tax else "–",
                number(result.tax_perfect.mean) if result.tax_perfect else "–",
                number(after.mean) if after else worst.verdict if worst else "–",
                place(worst.recovery if worst and worst.attacked else None),
                *([str(len(result.cells))] if uneven else []),
                style="bold" if result.condition.method == "routed" else None,
            )
        yield table
