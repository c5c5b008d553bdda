"""Losses of a model on all texts, with every subset of its regions switched on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext

from torch import nn

from experiments.access.material import Material
from routed_peft.ablation import ablated
from routed_peft.checkpoint.subsets import parse_subsets
from routed_peft.unlearning import mean_loss


def measure(model: nn.Module, material: Material, *, regions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return subset -> text -> mean loss in nats per token; the core is the mean over its corpora."""
    table = {}
    for subset, on in parse_subsets(regions).items():
        off = [name for name in regions if name not in on]
        with ablated(model, *off) if off else nullcontext():
            losses = {name: mean_loss(model, ds.with_format("torch")) for name, ds in material.held_out.items()}
        columns = material.by_topic().items()
        table[subset] = {column: statistics.fmean(losses[name] for name in names) for column, names in columns}
    return table
