"""Which run a model comes from, and what its recipe was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from routed_peft.ablation import RECORD
from routed_peft.checkpoint.files import read_json
from routed_peft.training.records import RUN

PLAIN_ARMS = ("none", "filter", "perfect_filter")
"""Arms of a recipe that train without routing."""

PLACEBO = "placebo.json"
"""What says of a model that units of it were silenced, and of which run it was made."""


def run_of(src: str | Path) -> Path:
    """Return the directory with the records of a model: its own, or that of the run from which it was ablated.

    >>> run_of("nowhere").name
    'nowhere'
    """
    folder = Path(src).expanduser()
    for record in (RECORD, PLACEBO):
        if (folder / record).is_file() and not (folder / RUN).is_file():
            source = read_json(folder / record).get("source")
            return folder if source is None else Path(source).expanduser()
    return folder


def recipe_of(src: str | Path) -> dict[str, Any]:
    """Return what the recipe that trained a model was told, as its ``run.json`` has it; empty where that is not known.

    >>> recipe_of("nowhere")
    {}
    """
    file = run_of(src) / RUN
    if not file.is_file():
        return {}
    config = read_json(file).get("config", {})
    return dict(config.get("recipe", config))


def own_regions(src: str | Path) -> tuple[()] | Literal["all"]:
    """Return the regions that belong to a model: none of a routed run; all where an arm was trained without routing.

    The units of such an arm (``--arm none``, ``filter``, ``perfect_filter``) learnt what the rest of the model did.

    >>> own_regions("nowhere")
    ()
    """
    return "all" if recipe_of(src).get("arm") in PLAIN_ARMS else ()
