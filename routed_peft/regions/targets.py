"""The plan of a region: its target modules, by default or as asked, with every check before the model is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from routed_peft.architectures import (
    WRITERS,
    find_mlps,
    is_plain,
    is_writer,
    layer_index,
    mlp_layout,
    model_type,
    supported_layouts,
    verify_layout,
    width,
)
from routed_peft.regions.config import KINDS, RoutedConfig
from routed_peft.regions.layer import RoutedLayer, inner_module
from routed_peft.regions.mlp import RoutedMLP
from routed_peft.regions.subspace import ProtectedEmbedding
from routed_peft.subspaces.basis import Subspace

_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")
"""Children of a decoder layer that normalize a writer's output before it is added (Gemma 2 and 3, OLMo 2 and 3, GLM-4)."""

_DROPOUTS = (
    "resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "embd_pdrop", "embed_dropout", "embedding_dropout",
)  # fmt: skip
"""Fields of configurations that drop out what a layer writes into the residual stream."""


@dataclass(frozen=True)
class RegionPlan:
    """All decisions about a region that its configuration leaves to the model; every check has passed.

    Attributes:
        targets: qualified names of the modules that get the region.
        target_modules: the names, or the regular expression, that select them.
        init: initialization of hidden units or heads; None for kinds without any.
        subspace: the directions that were read from `RoutedConfig.subspace`; None where there is no file to read.
        provenance: description of the directions, from that file or from the region's own files.
        store_base_part: whether the region's file holds the base's component along the directions.
    """

    targets: tuple[str, ...]
    target_modules: list[str] | str
    init: str | None
    subspace: Subspace | None
    provenance: dict[str, Any] | None
    store_base_part: bool | None

    def write_to(self, config: RoutedConfig) -> None:
        """Complete ``config`` with the decisions, so that PEFT saves them."""
        config.target_modules, config.init = self.target_modules, self.init
        config.provenance, config.store_base_part = self.provenance, self.store_base_part

    def basis(self, layer: int | None) -> Tensor | None:
        """Return the directions ``(d, k)`` at a decoder layer; None outside layers, or where there is no file to read."""
        return None if self.subspace is None or layer is None else self.subspace.at(layer)


def plan_targets(model: nn.Module, config: RoutedConfig) -> RegionPlan:
    """Decide where a region goes and check that it can go there. Neither argument is changed.

    Args:
        model: the model, without the layers around those of this kind (`unwrapped`).
        config: the region's configuration.

    Raises:
        ValueError: where the model has no default targets, nothing matches, or a target cannot hold the region. The message
            names the module and a way out.
    """
    if config.kind == "subspace" or config.subspace is not None:
        _check_residual_stream(model, config)
    chosen = copy.copy(config)
    chosen.target_modules = _target_modules(model, config)
    targets = _matching_modules(model, chosen)
    subspace = None if config.subspace is None else Subspace.load(config.subspace)
    if not targets:
        raise ValueError(f"`target_modules` = {chosen.target_modules} (`exclude_modules` = {config.exclude_modules}, "
            f"`layers_to_transform` = {config.layers_to_transform}) match no module of {type(model).__name__}. Its "
            f"supported MLPs: {list(find_mlps(model)) or 'none'}. Supported layouts: {supported_layouts()}.")  # fmt: skip
    init, store_base_part = config.init, config.store_base_part
    if init is None and "init" in KINDS[str(config.kind)].fields:
        init = "zero" if getattr(model, "name_or_path", None) else "model"
    if config.kind == "mlp":
        _check_mlps(targets)
    elif KINDS[str(config.kind)].layer is not None:
        _check_others(model, config, targets)
    else:
        _check_linear(model, config, targets)
        if subspace is not None or config.provenance is not None:
            _check_writers(model, config, targets=targets, subspace=subspace)
        if config.kind == "subspace":
            store_base_part = _stores_base_part(config, targets)
    return RegionPlan(
        targets=tuple(targets),
        target_modules=chosen.target_modules,
        init=init,
        subspace=subspace,
        provenance=config.provenance if subspace is None else subspace.describe(),
        store_base_part=store_base_part,
    )


def _target_modules(model: nn.Module, config: RoutedConfig) -> list[str] | str:
    if config.target_modules == "all-linear" and config.kind != "mlp":
        expanded: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
        return sorted(expanded.target_modules or ())
    if config.target_modules is not None:
        return config.target_modules
    kind, defaults = model_type(model), KINDS[str(config.kind)].targets
    if callable(defaults):
        # of full names PEFT would take those outside `layers_to_transform`, too; ends of names it chooses from itself
        layers = (
            [config.layers_to_transform] if isinstance(config.layers_to_transform, int) else config.layers_to_transform
        )
        full = {name for name, _ in model.named_modules()}
        names = [name for name in defaults(model) if layers is None or name not in full or layer_index(name) in layers]
        return names or _nothing(config, model)
    if kind is None or kind not in defaults:
        raise ValueError(f"no default `target_modules` for the model type {kind!r}: {_advice(model, config)}")
    return list(defaults[kind])


def _nothing(config: RoutedConfig, model: nn.Module) -> NoReturn:
    raise ValueError(f"{type(model).__name__} has no module for a region of kind {config.kind!r}: leave that part out")


def _advice(model: nn.Module, config: RoutedConfig) -> str:
    if config.kind != "mlp":
        return "pass the names of modules, such as linear layers"
    found = sorted({name.rpartition(".")[2] for name in find_mlps(model)})
    return f"pass them, for example {found}" if found else f"it has no supported MLP. Supported: {supported_layouts()}"


def _matching_modules(model: nn.Module, config: RoutedConfig) -> dict[str, nn.Module]:
    """Return the modules that PEFT will target under ``config``, by name; the insides of PEFT layers are left out."""
    wrapped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(wrapped) and check_target_module_exists(config, name)
    }


def _check_residual_stream(model: nn.Module, config: RoutedConfig) -> None:
    """Refuse models in which a writer's output differs from what arrives in the residual stream."""
    norms = sorted({name for path, _ in model.named_modules() if (name := path.rpartition(".")[2]) in _POST_NORMS})
    if norms:
        raise ValueError(f"{type(model).__name__} normalizes what a layer writes before it is added (`{norms[0]}`), so "
                         "a subspace of the residual stream is not one of the writer's output, and `W + U M` cannot be "
                         "merged: subspace regions are not built for such models (Gemma 2 and 3, OLMo 2 and 3). Use a "
                         "region of kind 'mlp' or 'lora'")  # fmt: skip
    if model_type(model) not in WRITERS:
        raise ValueError(f"the residual writers of the model type {model_type(model)!r} are not known; known are "
                         f"{sorted(WRITERS)}")  # fmt: skip
    settings = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    dropouts = {name: p for name in _DROPOUTS if (p := getattr(settings, name, 0.0))}
    if dropouts and not config.inference_mode:
        raise ValueError(f"the model applies dropout to what its layers write ({dropouts}), so directions before and "
                         f"after it differ: load it with `{next(iter(dropouts))}=0.0`")  # fmt: skip


def _check_mlps(targets: Mapping[str, nn.Module]) -> None:
    verified: set[type] = set()
    for module in targets.values():
        mlp = module.base_layer if isinstance(module, RoutedMLP) else module
        layout = mlp_layout(mlp)
        if type(mlp) not in verified:
            verified.add(type(mlp))
            verify_layout(mlp, layout)


def _check_others(model: nn.Module, config: RoutedConfig, targets: Mapping[str, nn.Module]) -> None:
    kind = KINDS[str(config.kind)]
    joins = kind.layer if isinstance(kind.layer, type) else ()
    for name, module in targets.items():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, joins) and not getattr(joins, "outer", False):
            raise ValueError(f"{name!r} holds a region of another kind already ({type(module).__name__}), beside which "
                             f"one of kind {config.kind!r} cannot stand: choose other `target_modules`")  # fmt: skip
        if kind.check is not None:
            kind.check(name, inner_module(module))
    if kind.check_together is not None:
        kind.check_together(model, targets)


def _check_linear(model: nn.Module, config: RoutedConfig, targets: Mapping[str, nn.Module]) -> None:
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in targets.items():
        inner = inner_module(module)
        if not isinstance(inner, nn.Linear | Conv1D):
            raise ValueError(f"a region of kind {config.kind!r} goes to linear layers (nn.Linear, Conv1D), got "
                             f"{name!r}, a {type(inner).__name__}: choose other `target_modules`")  # fmt: skip
        if embeddings is not None and inner.weight is getattr(embeddings, "weight", None):
            raise ValueError(f"{name!r} shares its weight with the embeddings, so a region on it cannot be merged: "
                             "leave it out of `target_modules`")  # fmt: skip


def _check_writers(
    model: nn.Module, config: RoutedConfig, *, targets: Mapping[str, nn.Module], subspace: Subspace | None
) -> None:
    kind = str(model_type(model))
    writers = {name: module for name, module in targets.items() if is_writer(name, kind)}
    others = sorted(set(targets) - set(writers))
    if config.kind == "subspace" and others:
        raise ValueError(f"a region of kind 'subspace' goes to residual writers, here those ending in {WRITERS[kind]}; "
                         f"got {others[0]!r}: choose among these, or leave `target_modules` out")  # fmt: skip
    if subspace is None:
        return
    for name, module in writers.items():
        if width(module, "out") != subspace.width:
            raise ValueError(f"`subspace` belongs to a residual stream of width {subspace.width}, but that of {name!r} "
                             f"has {width(module, 'out')}: it was made for another model")  # fmt: skip
        index = layer_index(name)
        assert index is not None
        subspace.at(index)


def _stores_base_part(config: RoutedConfig, targets: Mapping[str, nn.Module]) -> bool:
    plain = all(is_plain(cast(Tensor, inner_module(module).weight)) for module in targets.values())
    if config.store_base_part and not plain:
        raise ValueError("`store_base_part=True` on a quantized base, whose weights cannot be trained: leave it at "
                         "None, and train adapters beside the region")  # fmt: skip
    return plain if config.store_base_part is None else config.store_base_part


def input_embeddings(model: nn.Module, size: int) -> dict[str, nn.Embedding | ProtectedEmbedding]:
    """Return by name the embeddings that start the residual stream of width ``size``: of tokens and of positions."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | ProtectedEmbedding)
        and not name.endswith(".base_layer")
        and module.embedding_dim == size
        and layer_index(name) is None
    }


@contextmanager
def unwrapped(model: nn.Module, kind: str | None) -> Iterator[None]:
    """Take off layers that stand around others (`RoutedLayer.outer`) within the block, so that PEFT finds what is inside.

    The modules inside then have the names of the plain model. Nothing is taken off for a ``kind`` of such layers itself.

    Raises:
        ValueError: while a region is merged.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, RoutedLayer) and child.outer and kind not in ("mlp", "heads")
    ]
    merged = [region for *_, child in wrapped for region in child.merged_adapters]
    if merged:
        raise ValueError(f"the regions {sorted(set(merged))} are merged into the base: call `unmerge_adapter()` first")
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            child.base_layer = getattr(parent, name)  # which may have got a layer of its own
            setattr(parent, name, child)
