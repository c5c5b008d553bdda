"""Models and tokenizers from a path or Hub id, and lm-eval on all regions of a run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from routed_peft.checkpoint.fetch import fetch, hub_arguments
from routed_peft.checkpoint.layout import ROUTING, Layout
from routed_peft.checkpoint.load import load_run
from routed_peft.checkpoint.open_run import OpenRun
from routed_peft.evaluation.harness import DEFAULT_TASKS, Scores, default_configurations, evaluate_configurations
from routed_peft.evaluation.text_loss import check_causal
from routed_peft.files import check_writable, read_json, write_json
from routed_peft.mistakes import reading
from routed_peft.runs.records import read_recipe

logger = logging.get_logger(__name__)

PATIENCE = datetime.timedelta(days=7)
"""Wait of processes that share a grid of attacks for each other."""

Regions = Literal["all"] | Sequence[str]

NO_MODEL = "is an adapter without its model: give its run, or merge it first (`merge_and_unload`), and save that"


def processes() -> PartialState:
    """Return accelerate's state; without an accelerator processes communicate over gloo, and not as independent ones."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def parse_regions(regions: str | None) -> Regions:
    """Parse the regions of a command line: names joined by ``+``, or all, or none.

    >>> parse_regions("bio+cyber"), parse_regions("none"), parse_regions("all")
    (['bio', 'cyber'], [], 'all')
    """
    if regions is None or regions.lower() == "none":  # lm-eval reads None as the value of that name
        return []
    return "all" if regions == "all" else regions.split("+")


def open_source(
    src: str | Path, revision: str | None = None, *, regions_repo: str | Path | None = None, **hub: Any
) -> OpenRun | None:
    """Open a run that `save_routed` wrote; return None for a plain checkpoint, and raise on an adapter without its model."""
    root, commit = fetch(src, revision, **hub)
    adapter = root / "adapter_config.json"
    if adapter.is_file() and not any((root / name).is_file() for name in (ROUTING, "config.json")):
        about = read_json(adapter)  # transformers loads others together with the base that they name
        if about.get("peft_type") == "ROUTED" or not about.get("base_model_name_or_path"):
            raise ValueError(f"{str(src)!r} {NO_MODEL}")
    return OpenRun(Layout.read(root, str(src)), commit, hub, regions_repo) if (root / ROUTING).is_file() else None


def own_regions(run: OpenRun | None) -> Regions:
    """Return the regions of a run that belong to its model; "all" if none of them would be left out."""
    kept = [] if run is None else run.layout.kept_regions
    return "all" if run is not None and kept == run.layout.regions else kept


def tokenizer_place(src: str | Path, run: OpenRun | None, revision: str | None = None) -> tuple[str, str | None]:
    """Return place and revision of a tokenizer: beside the weights, or else that of the frozen base."""
    if run is None:
        return str(src), revision
    layout = run.layout
    if (layout.root / "tokenizer_config.json").is_file():
        return str(layout.root), None
    base = layout.data["base"]
    if base["id"] is None:
        raise ValueError(f"{str(src)!r} has no tokenizer: save the run's tokenizer there, or give `tokenizer`")
    return base["id"], base["revision"]


def load_tokenizer(src: str | Path, revision: str | None = None, **kwargs: Any) -> Any:
    """Load the tokenizer of a run or checkpoint; ``kwargs`` are those of `AutoTokenizer.from_pretrained`."""
    return _read_tokenizer(*tokenizer_place(src, open_source(src, revision), revision), **kwargs)


def _read_tokenizer(place: str | Path, revision: str | None, **kwargs: Any) -> Any:
    with reading(place):
        return AutoTokenizer.from_pretrained(place, revision=revision or "main", **kwargs)


def held_out_pair(src: str | Path, metadata: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the built-in pair whose text is scored, and whether ``src`` is known to have been trained on it.

    >>> held_out_pair("nowhere", {"pair": "spanish"}), held_out_pair("nowhere", {})
    (('spanish', True), ('biology', False))
    """
    recipe = read_recipe(src)
    files = ("train_file", "forget_file", "retain_file", "text_files")
    own = None if any(map(recipe.get, files)) else recipe.get("pair")
    return metadata.get("pair") or own or "biology", bool(metadata.get("pair") or own)


def load_source(
    src: str | Path,
    regions: Regions = "all",
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    regions_repo: str | Path | None = None,
    **from_pretrained_kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Load a run with some of its regions, or a plain checkpoint, and its tokenizer.

    Args:
        src: directory or Hub id.
        regions: names of the regions to load, or "all"; `[]` is the ablated model.
        revision: branch, tag or commit of a Hub id.
        tokenizer: an object, a path or an id, to use instead of the run's own.
        **from_pretrained_kwargs: see `load_routed`, as for ``regions_repo``.

    Raises:
        ValueError: on an unknown region, or without a tokenizer; and as `load_routed` does.
    """
    hub = hub_arguments(from_pretrained_kwargs)
    run = open_source(src, revision, regions_repo=regions_repo, **hub)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        place, at = (tokenizer, None) if tokenizer else tokenizer_place(src, run, revision)
        trust = from_pretrained_kwargs.get("trust_remote_code")
        tokenizer = _read_tokenizer(place, at, **hub, trust_remote_code=trust)
    if run is not None:
        names = run.layout.regions if regions == "all" else regions
        return load_run(run, names, **from_pretrained_kwargs), tokenizer
    if regions != "all" and regions:
        raise ValueError(f"`regions` names {list(regions)}, but {str(src)!r} is a plain checkpoint without regions")
    with reading(src):
        plain = AutoModelForCausalLM.from_pretrained(src, revision=revision or "main", **from_pretrained_kwargs)
    return plain, tokenizer


def evaluate_source(
    src: str | Path,
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    regions: Mapping[str, Regions] | Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    output: str | Path | None = None,
    **load_kwargs: Any,
) -> dict[str, Scores]:
    """Load a saved run once, and measure it with all of its regions, ablated, and with any subset.

    Args:
        regions: further subsets to measure: one list of names, or ``{name of the configuration: list of names}``. By
            default each region alone, where there are several.
        metadata: see `evaluate`, like ``tasks``, ``limit`` and ``batch_size``; its ``pair`` is by default that of the run's
            training.
        device: of the model; by default the choice of transformers.
        output: a JSON file to write, with results and settings.
        **load_kwargs: see `load_source`: ``revision``, ``tokenizer``, and arguments of `load_routed`.

    Returns:
        ``{configuration: {"task/metric": value}}``; the configuration of a model without regions is "model".

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: on an unknown task or region, or without a tokenizer; and as `load_routed` does.
    """
    where = {name: load_kwargs.get(name) for name in ("revision", "regions_repo")}
    run = open_source(src, **where, **hub_arguments(load_kwargs))
    names = [] if run is None else run.layout.regions
    if run is not None and regions is None and (here := run.regions_here()) != names:
        logger.warning(f"regions of {str(src)!r} are not here and are not measured: {sorted(set(names) - set(here))}")
        names = here
    configurations = _configurations(str(src), names, regions)
    if output is not None:
        output = Path(output)
        if output.is_dir():
            raise ValueError(f"`output` {str(output)!r} is a directory: name a file in it")
        check_writable(output.parent)  # before hours are spent on its content
    metadata = {"pair": held_out_pair(src, metadata or {})[0], **(metadata or {})}
    model, tokenizer = load_source(src, names, **load_kwargs)
    if device is not None:
        model.to(device)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    settings: dict[str, Any] = {"tasks": names, "metadata": metadata, "limit": limit, "configurations": configurations}
    results = evaluate_configurations(model, tokenizer, **settings, batch_size=batch_size)
    if output is not None:
        libraries = ("routed_peft", "lm_eval", "transformers", "peft", "torch")
        about = {"source": str(src), "revision": where["revision"], **settings}
        about |= {"versions": {name: version(name) for name in libraries}, "results": results}
        write_json(output, about, default=str)
    return results


def _configurations(
    src: str, names: Sequence[str], asked: Mapping[str, Regions] | Sequence[str] | None
) -> dict[str, list[str]]:
    """Return the regions of each configuration to measure; raise ValueError on unknown ones."""
    chosen: dict[str, list[str]] = default_configurations(names)
    if asked is not None:
        further = asked if isinstance(asked, Mapping) else {" + ".join(asked) or "ablated": asked}
        kept = {key: chosen[key] for key in ("all regions", "ablated", "model") if key in chosen}
        chosen = kept | {key: list(names) if value == "all" else list(value) for key, value in further.items()}
    if unknown := sorted({name for value in chosen.values() for name in value} - set(names)):
        raise ValueError(f"`regions` names {unknown}; the regions of {src!r} are {list(names)}")
    return chosen


def open_plain(
    src: str | Path,
    regions: Regions | None = None,
    *,
    revision: str | None = None,
    regions_repo: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model in float32 as a plain one, adapters merged, with its tokenizer; `own_regions` by default."""
    run = open_source(src, revision)
    if run is None:
        if Path(src, "adapter_config.json").is_file() and not Path(src, "config.json").is_file():
            raise ValueError(f"{str(src)!r} {NO_MODEL}")
        known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        with reading(src):
            config = AutoConfig.from_pretrained(src, revision=revision or "main", trust_remote_code=trust_remote_code)
        if config.architectures and not known & set(config.architectures) and not hasattr(config, "auto_map"):
            what = f"{', '.join(config.architectures)}, not a causal language model"
            raise ValueError(f"{str(src)!r} is a {what}: there is no loss on text to relearn")
    regions = own_regions(run) if regions is None else regions
    where: dict[str, Any] = {"revision": revision, "regions_repo": regions_repo}
    model, tokenizer = load_source(src, regions, **where, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    check_causal(model)
    return cast(PreTrainedModel, model.to(device or processes().device)), tokenizer
