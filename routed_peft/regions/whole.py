"""A whole region: the plan of each of its parts, and sizes in proportion to the base where none were asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from routed_peft.architectures import find_mlps, layer_index, mlp_layout, width
from routed_peft.regions.config import KINDS, WHOLE, RoutedConfig
from routed_peft.regions.embeddings import table_names
from routed_peft.regions.mlp import RoutedMLP
from routed_peft.regions.peft_type import PREFIX
from routed_peft.regions.targets import RegionPlan, plan_targets, unwrapped

_UNITS = 6
"""The base has so many hidden units for each one of the region, by default."""

_RANK = 16
_WIDTHS = 32
"""The default rank is `_RANK`, or the width of the residual stream divided by `_WIDTHS` where that is more."""

_FULL_TABLE = 65536
"""Tokens up to which a region has full rows of the table by default; beyond, they are of low rank."""


@dataclass(frozen=True)
class PlannedPart:
    """One part of a region, and its plan."""

    config: RoutedConfig
    plan: RegionPlan


def plan_region(model: nn.Module, config: RoutedConfig) -> list[PlannedPart]:
    """Plan a region, one plan per part; then complete ``config``. The model is not changed.

    Raises:
        ValueError: as `plan_targets`, before ``config`` is changed.
    """
    _check_tokens(model, config.embeddings)
    if config.kind != WHOLE:
        found = callable(KINDS[str(config.kind)].targets)  # in any model alike, so their names need not be saved
        part = PlannedPart(copy.copy(config) if found else config, _plan(model, config))
        part.plan.write_to(part.config)
        config.init = part.config.init
        return [part]
    chosen = copy.copy(config)
    if not chosen.given_parts():
        _set_default_sizes(model, chosen)
    if chosen.r is not None and chosen.lora_alpha is None:
        chosen.lora_alpha = chosen.r
    parts = []
    for name in chosen.given_parts():
        targets = (
            None if name != "r" else chosen.target_modules or _linear_layers(model, outside=chosen.size is not None)
        )
        part_config = chosen.part(name, **({} if targets is None else {"target_modules": targets}))
        plan = _plan(model, part_config)
        plan.write_to(part_config)
        parts.append(PlannedPart(part_config, plan))
        if name == "r":
            chosen.target_modules = plan.target_modules
        if plan.init is not None:
            chosen.init = plan.init
    for field in (*chosen.given_parts(), "lora_alpha", "target_modules", "init"):
        setattr(config, field, getattr(chosen, field))
    return parts


def _check_tokens(model: nn.Module, tokens: object) -> None:
    sizes = [len(model.get_submodule(name).weight) for name in table_names(model)]  # type: ignore[arg-type]
    if isinstance(tokens, list) and sizes and max(tokens) >= min(sizes):
        raise ValueError(f"`embeddings` has the token {max(tokens)}, but the table has {min(sizes)} rows: leave it out")


def _plan(model: nn.Module, config: RoutedConfig) -> RegionPlan:
    with unwrapped(model, config.kind):
        return plan_targets(model, config)


def _set_default_sizes(model: nn.Module, config: RoutedConfig) -> None:
    mlps = list(find_mlps(model).values()) or [m for m in model.modules() if isinstance(m, RoutedMLP)]
    inner = [mlp.base_layer if isinstance(mlp, RoutedMLP) else mlp for mlp in mlps]
    hidden = [width(getattr(mlp, mlp_layout(mlp).down), "in") for mlp in inner]
    stream = [width(getattr(mlp, mlp_layout(mlp).down), "out") for mlp in inner]
    if hidden:
        config.size = max(8, min(hidden) // _UNITS // 8 * 8)
    config.r = max(_RANK, min(stream, default=0) // _WIDTHS)
    tables = [model.get_submodule(name) for name in table_names(model)]
    if tables:
        rows = max(len(table.weight) for table in tables)  # type: ignore[arg-type]
        config.embeddings = "full" if rows <= _FULL_TABLE else config.r


def _linear_layers(model: nn.Module, *, outside: bool) -> list[str]:
    """Return the ends of the names of the linear layers in decoder layers, with ``outside`` but for those in MLPs."""
    mlps = [*find_mlps(model), *(name for name, module in model.named_modules() if isinstance(module, RoutedMLP))]
    within = tuple(f"{name}." for name in mlps)
    names = [
        name.replace(".base_layer", "")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and layer_index(name) is not None and not _of_adapter(name)
    ]
    inside = {_last(name) for name in names if name.startswith(within)} if outside else set()
    chosen = [name for name in names if not (outside and name.startswith(within))]
    return sorted({_last(name, 2 if _last(name) in inside else 1) for name in chosen})


def _of_adapter(name: str) -> bool:
    return any(part in ("lora_A", "lora_B") or part.startswith(PREFIX) for part in name.split("."))


def _last(name: str, count: int = 1) -> str:
    return ".".join(name.split(".")[-count:])
