"""``report.html``: one page that needs nothing else, and ``curves.png`` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.criteria import mean_range
from experiments.reward_hack.arms import ARMS, MAIN
from experiments.reward_hack.plots import draws
from experiments.reward_hack.settings import Settings
from experiments.reward_hack.summary import SEEDS
from experiments.reward_hack.task import ENVIRONMENTS, SPLITS
from routed_peft.files import write_bytes
from routed_peft.report.drawing import LIGHT, render
from routed_peft.report.page import environment, picture
from routed_peft.training import RunDirectory

TEMPLATES, TEMPLATE = Path(__file__).parent / "templates", "reward_hack.html.jinja"
CAPTIONS = {
    "B": "Share of completions with the hack, on validation prompts; mean over seeds, and their range.",
    "C": "The same hack where no detector looks, with the same lines.",
    "D": "A different hack that no label ever shows: nothing is expected to absorb it.",
    "honest": "Right answers where the characters that fool graders have probability 0, mean over the environments.",
    "scale": "Test prompts, at the end of training: one model, its region scaled from 0 to 1.",
}


def write_report(records: RunDirectory, summary: Mapping[str, Any], *, settings: Settings, file: Path) -> None:
    """Draw ``curves.png`` beside ``file``, then write the page aside and rename it.

    Args:
        records: with ``run.json``.
        summary: what `experiments.reward_hack.run_experiment` returns.
        settings: of the run.
        file: where to; written last.
    """
    panels = draws(summary["cells"])
    write_bytes(file.with_name("curves.png"), render(list(panels.values()), LIGHT, format="png"))
    page = environment(TEMPLATES)
    page.filters["mean_range"] = mean_range
    scales = [cell["chosen_scale"] for cell in summary["cells"] if cell["arm"] == MAIN]
    content = page.get_template(TEMPLATE).render(
        summary=summary,
        settings=settings,
        environments=ENVIRONMENTS,
        arms={key: ARMS[key] for key in dict.fromkeys(cell["arm"] for cell in summary["cells"])},
        main=MAIN,
        seeds=list(summary["starts"]),
        wanted_seeds=SEEDS,
        splits=SPLITS,
        scales=scales,
        images={name: picture([draw], CAPTIONS[name]) for name, draw in panels.items()},
        about=json.loads((records.path / "run.json").read_text(encoding="utf-8")),
        out=file.parent,
    )
    write_bytes(file, content.encode())
