"""Regions of kind subspace on tiny models, and the slow, obvious way to compute what they do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from families import tiny, tokens
from peft import PeftModel, get_peft_model
from regions_parts import randomize
from torch import Tensor, nn

from routed_peft import RoutedConfig
from routed_peft.architectures import find_writers
from routed_peft.regions.subspace import SubspaceLayer
from routed_peft.subspaces import Subspace

FAMILIES = ("llama", "qwen3", "gemma", "phi3", "gpt2", "gpt_neo", "gpt_neox", "phi", "falcon")
"""The families that subspace regions are built for."""

X = tokens()


def subspace_file(folder: Path, k: int = 2, width: int = 16, seed: int = 5, layers: int | None = None) -> str:
    """Write a random subspace, shared by all layers or one for each, and return its path: no run may be saved beside it."""
    (folder / "subspaces").mkdir(parents=True, exist_ok=True)
    draw = lambda i: torch.randn(k, width, generator=torch.Generator().manual_seed(seed + i))
    directions = draw(0) if layers is None else {i: draw(i) for i in range(layers)}
    subspace = Subspace.from_directions(directions, source="random", seed=seed)
    return str(subspace.save(folder / "subspaces" / f"u{k}-{seed}.safetensors"))


def with_subspace(base: nn.Module, path: str, name: str = "persona", start: bool = False, **fields: Any) -> PeftModel:
    """Wrap ``base`` with one region; its weights are random, or at their start, zero."""
    config = RoutedConfig(kind="subspace", subspace=path, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(base, config, adapter_name=name)
    if not start:
        randomize(model, name)
    return model


def subspace_layers(model: nn.Module) -> list[SubspaceLayer]:
    return [module for module in model.modules() if isinstance(module, SubspaceLayer)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(X).logits


def columns(name: str, gradient: Tensor, family: str) -> Tensor:
    """A weight's gradient with the residual stream as its first axis."""
    transposed = family in ("gpt2",) and name.endswith("c_proj") or "wte" in name or "wpe" in name or "embed" in name
    return gradient.T if transposed else gradient


@contextmanager
def by_hand(base: nn.Module, u: Mapping[str, Tensor], m: Mapping[str, Tensor], embeddings: list[nn.Module]):
    """Compute ``y + U M sg(x)`` at every writer of a plain model, with gradient cut by projecting a difference of zero."""

    def cut(y: Tensor, basis: Tensor) -> Tensor:
        difference = y - y.detach()
        return y.detach() + difference - difference @ basis @ basis.T

    with ExitStack() as stack:
        for name, writer in find_writers(base).items():
            hook = lambda _, args, y, name=name: cut(y, u[name]) + args[0].detach() @ m[name].T @ u[name].T
            stack.callback(writer.register_forward_hook(hook).remove)
        for module in embeddings:
            stack.callback(module.register_forward_hook(lambda _, args, y: cut(y, next(iter(u.values())))).remove)
        yield


def float64(family: str, **overrides: Any) -> nn.Module:
    return tiny(family, torch.float64, **overrides)
