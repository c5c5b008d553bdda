"""lm-eval inside this process, on one model with all of its regions, with some, and with none.

lm-eval is an optional dependency (``pip install "routed_peft[eval]"``) and is imported when a measurement starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from torch import nn

from routed_peft.ablation import ablated
from routed_peft.adapters import routing_record
from routed_peft.deprecation import formerly_positional

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_TASKS = ("routed_loss", "routed_mc", "routed_cloze")
Scores = dict[str, float]


@formerly_positional("tasks", "metadata", "regions", "limit", "batch_size")
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = DEFAULT_TASKS,
    metadata: Mapping[str, Any] | None = None,
    regions: Literal["all"] | Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    base_adapters: Sequence[str] | None = None,
) -> Scores:
    """Measure a live model with lm-eval; its mode (training or evaluation) is not changed.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tasks: names of lm-eval tasks or groups: those of `routed_peft.tasks`, and lm-eval's own.
        metadata: of the tasks: ``forget_file``, ``retain_file``, ``pair``, ``forget_mc_file``, ...
        regions: the regions to leave active, with all others ablated; None and "all" ablate none.
        limit: the number of examples per task, for a quick look; None takes all.
        base_adapters: adapters of the base, never ablated; by default those recorded by `load_routed`.

    Returns:
        ``{"task/metric": value}``: losses ``token_ce`` in nats per token and ``bits_per_byte``, accuracies from 0 to 1.

    Raises:
        ImportError: without lm-eval.
        ValueError: on an unknown name in `tasks` or `regions`.
    """
    about: dict[str, Any] = {"tasks": tasks, "metadata": metadata, "limit": limit, "batch_size": batch_size}
    one = evaluate_configurations(model, tokenizer, configurations={"": regions}, base_adapters=base_adapters, **about)
    return one[""]


def evaluate_configurations(
    model: nn.Module,
    tokenizer: Any,
    *,
    configurations: Mapping[str, Literal["all"] | Sequence[str] | None] | None = None,
    tasks: Sequence[str] = DEFAULT_TASKS,
    metadata: Mapping[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    base_adapters: Sequence[str] | None = None,
) -> dict[str, Scores]:
    """Measure one live model under several sets of active regions; tasks and their data are built once.

    Args:
        configurations: name -> the active regions. By default "all regions", "ablated", and each of several regions alone;
            "model" for a model without regions. All other arguments are those of `evaluate`.

    Returns:
        ``{configuration: {"task/metric": value}}``.
    """
    if configurations is None:
        configurations = default_configurations(region_names(model, base_adapters))
    for regions in configurations.values():  # a misspelled region must not cost the measurements before it
        _only(model, regions, base_adapters)
    from routed_peft.evaluation.lm_eval_model import measurement

    measure = measurement(model, tokenizer, tasks=tasks, metadata=metadata, limit=limit, batch_size=batch_size)
    found = {}
    for name, regions in configurations.items():
        with _only(model, regions, base_adapters):
            found[name] = measure()
    return found


def region_names(model: nn.Module, base_adapters: Sequence[str] | None = None) -> list[str]:
    """Return the regions of a model: its PEFT adapters without those of the base."""
    kept = routing_record(model).base_adapters if base_adapters is None else base_adapters
    return [name for name in getattr(model, "peft_config", {}) if name not in kept]


def default_configurations(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the configurations to compare: all regions, none, and each of several alone.

    >>> default_configurations(["bio", "cyber"]), default_configurations([])
    ({'all regions': ['bio', 'cyber'], 'ablated': [], 'only bio': ['bio'], 'only cyber': ['cyber']}, {'model': []})
    """
    if not names:
        return {"model": []}
    alone = {f"only {name}": [name] for name in names} if len(names) > 1 else {}
    return {"all regions": list(names), "ablated": [], **alone}


def results_frame(results: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Return results as a frame: one row per ``task/metric``, one column per configuration.

    >>> results_frame({"ablated": {"routed_forget_mc/acc": 0.25}}).loc["routed_forget_mc/acc", "ablated"]
    np.float64(0.25)
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError('a frame of results needs pandas: pip install "routed_peft[report]"') from error
    return pd.DataFrame({name: dict(scores) for name, scores in results.items()})


def results_table(
    results: Mapping[str, Mapping[str, float]], title: str | None = None, caption: str | None = None
) -> Table:
    """Return results as a table for the terminal: tasks down, configurations across.

    >>> results_table({"ablated": {"routed_forget_mc/acc": 0.25}}).row_count
    1
    """
    table = Table(title=title, caption=caption)
    table.add_column("task")
    table.add_column("metric")
    for name in results:
        table.add_column(name, justify="right")
    for key in dict.fromkeys(key for scores in results.values() for key in scores):
        row = [scores.get(key, math.nan) for scores in results.values()]
        table.add_row(*key.rsplit("/", 1), *("–" if math.isnan(value) else f"{value:.3f}" for value in row))
    return table


def _only(
    model: nn.Module, chosen: Literal["all"] | Sequence[str] | None, base_adapters: Sequence[str] | None
) -> AbstractContextManager[object]:
    """Leave only the regions of `chosen` active for the length of a block; raise ValueError at once on unknown ones."""
    if chosen is None or chosen == "all":
        return nullcontext()
    names = region_names(model, base_adapters)
    if isinstance(chosen, str) or (unknown := [name for name in chosen if name not in names]):
        got = chosen if isinstance(chosen, str) else unknown
        raise ValueError(f"`regions` must be a list from {names}, got {got!r}: name regions of this model, or 'all'")
    others = [name for name in names if name not in chosen]
    return ablated(model, *others) if others else nullcontext()
