"""A page of experiments and attacked checkpoints that needs nothing else, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from experiments.report.figures import after_worst
from experiments.report.numbers import part
from experiments.report.reading import EXPERIMENT, read_sources
from experiments.report.sections import Section
from experiments.report.verdicts import edge
from routed_peft.files import write_bytes
from routed_peft.report.checkpoints import FIGURES, PAGE, Checkpoint, page_values, write_figures
from routed_peft.report.numbers import number, place, share
from routed_peft.report.page import environment

TEMPLATES, TEMPLATE = Path(__file__).parent / "templates", "experiments.html.jinja"


@dataclass(frozen=True)
class Report:
    """Result of `write_report`: the file, and the experiments and checkpoints that it shows."""

    page: Path
    sections: Sequence[Section]
    checkpoints: Sequence[Checkpoint]


def write_report(places: Sequence[str | Path], out: str | Path) -> Report:
    """Draw figures and write a page about experiments and attacked checkpoints.

    Args:
        places: files and directories of files (see `experiments.report.reading.read_sources`).
        out: directory, for ``report.html`` and ``figures/``: PNG and SVG, whose names begin with that of the summary. Files
            of these names there are replaced.

    Raises:
        ValueError: see `read_sources`; nothing is written then.
    """
    sources = read_sources(places)
    sections = [Section(source) for source in sources if source.kind is EXPERIMENT]
    checkpoints = [Checkpoint(source) for source in sources if source.kind is not EXPERIMENT]
    cards = [section.card(result) for section in sections for group in section.groups for result in group.results]
    values = page_values(checkpoints)
    templates = environment(TEMPLATES)
    templates.filters |= {"edge": edge, "part": part}
    content = templates.get_template(TEMPLATE).render(
        **values, sections=sections, cards=list({card.name: card for card in cards}.values())
    )
    folder = Path(out)
    drawn = {section.source.name: section.figures for section in sections}
    write_figures(folder / FIGURES, drawn)
    write_figures(folder / FIGURES, {"relearn": [values["attacked"]]})
    write_bytes(folder / PAGE, content.encode())
    return Report(folder / PAGE, sections, checkpoints)


def verdict_tables(section: Section) -> Iterator[Table]:
    """Yield an experiment as tables for the terminal, one for each share and quality of labels."""
    for group in section.groups:
        title = ", ".join(filter(None, [section.title, group.about]))
        table = Table(
            title=title,
            caption="means over seeds, nats per token; retain tax: against the filter with the same labels, and against the "
            "perfect filter",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        uneven = len({len(result.cells) for result in group.results}) > 1
        names = ("forget", "retain", "removed", "retain tax", "perfect", "relearned", "steps")
        for name in ("", *names, *(["seeds"] if uneven else [])):
            table.add_column(name, justify="right" if name else "left", no_wrap=not name)
        for result in group.results:
            after, worst = after_worst(result), result.worst
            table.add_row(
                section.card(result).label,
                number(result.forget.mean),
                number(result.retain.mean),
                share(result.removed.mean) if result.removed else "–",
                number(result.retain_tax_same_labels.mean) if result.retain_tax_same_labels else "–",
                number(result.retain_tax.mean) if result.retain_tax else "–",
                number(after.mean) if after else worst.verdict if worst else "–",
                place(worst.recovery if worst and worst.attacked else None),
                *([str(len(result.cells))] if uneven else []),
                style="bold" if result.condition.method == "routed" else None,
            )
        yield table
