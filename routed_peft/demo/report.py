"""``report.html``: one page that needs nothing else, and ``curves.png`` beside it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from routed_peft.demo.measuring import CHANCE
from routed_peft.demo.plots import DARK, LIGHT, PANELS, render
from routed_peft.demo.settings import ARMS, DemoSettings
from routed_peft.demo.summary import ROWS, percent
from routed_peft.training import RunDirectory

TEMPLATES = Path(__file__).parents[1] / "templates"
TEMPLATE = "report.html.jinja"
CAPTIONS = {
    "forget": "Validation loss on biology while training.",
    "retain": "Validation loss on other text while training.",
    "relearning": "Loss on biology test text while an attacker finetunes the plain checkpoint; the worst of all learning "
    "rates tried at every step.",
    "ablation": "Test loss of one and the same run with its region and without it. Lines: no routing and perfect filter.",
}


def write_report(records: RunDirectory, summary: Mapping[str, Any], settings: DemoSettings, file: Path) -> None:
    """Draw ``curves.png`` beside ``file``, then write the page aside and rename it.

    Args:
        records: with the points of the run.
        summary: what `routed_peft.demo.run_demo` returns.
        settings: of the run.
        file: where to; written last.
    """
    points = records.points()
    _write(file.with_name("curves.png"), render(PANELS, LIGHT, points, summary, "png"))
    images = {
        name: {"caption": CAPTIONS[name]}
        | {mode: _inline(render([name], theme, points, summary)) for mode, theme in (("light", LIGHT), ("dark", DARK))}
        for name in PANELS
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": share}
    page = environment.get_template(TEMPLATE).render(
        summary=summary,
        models=summary["models"],
        rows=ROWS,
        arms=ARMS,
        settings=settings,
        about=json.loads((records.path / "run.json").read_text(encoding="utf-8")),
        images=images,
        chance=CHANCE,
        last=str(settings.relearn_steps[-1]),
        out=file.parent,
    )
    _write(file, page.encode())


def number(value: float | None, digits: int = 2) -> str:
    """Write a number, or a dash where there is none.

    >>> number(3.14159), number(None)
    ('3.14', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def share(value: float | None) -> str:
    """Write a share as a percentage; None, in JSON, is NaN.

    >>> share(0.5), share(None)
    ('50 %', 'not measurable')
    """
    return percent(float("nan") if value is None else value)


def _inline(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _write(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, file)
