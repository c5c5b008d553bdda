"""The frozen reference of unlearning: the original model."""

from __future__ import annotations

import copy

from torch import nn


def frozen_reference(model: nn.Module, reference: nn.Module | None = None) -> nn.Module:
    """Return ``reference``, a model of the same architecture, or else a copy of ``model``: frozen, in evaluation mode."""
    if reference is model:
        raise ValueError("`reference` is `model` itself, which training changes: pass a copy, or None")
    if reference is not None:
        got, wanted = ({key: tuple(p.shape) for key, p in each.named_parameters()} for each in (reference, model))
        if odd := sorted({key for key in got.keys() | wanted.keys() if got.get(key) != wanted.get(key)}):
            raise ValueError(f"`reference` ({type(reference).__name__}) is of another architecture than `model` "
                             f"({type(model).__name__}): {odd[0]!r} has the shape {got.get(odd[0], 'none')}, expected "
                             f"{wanted.get(odd[0], 'none')}. Both must be checkpoints of one model")  # fmt: skip
    frozen = copy.deepcopy(model) if reference is None else reference
    return frozen.requires_grad_(False).eval()
