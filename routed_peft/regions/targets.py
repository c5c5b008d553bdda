"""Which modules a region goes to, by default and as asked, and the checks that it can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from routed_peft.architectures import (
    POST_NORMS,
    SUPPORTED,
    WRITERS,
    find_mlps,
    is_plain,
    is_writer,
    layer_index,
    mlp_layout,
    verify_layout,
    width,
)
from routed_peft.regions.config import RoutedConfig
from routed_peft.regions.mlp import RoutedMLP
from routed_peft.regions.subspace import GuardedEmbedding
from routed_peft.subspaces.basis import Subspace

MLP_TARGETS = {
    model_type: ["mlp"]
    for model_type in (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 smollm3 granite phi3 phi gpt2 gpt_neo "
        "gpt_neox falcon starcoder2 stablelm"
    ).split()
}
"""The MLPs of each model type."""

_DEFAULTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "mlp": MLP_TARGETS,
    "lora": TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "subspace": WRITERS,
}
_DROPOUTS = (
    "resid_pdrop", "resid_dropout", "residual_dropout", "hidden_dropout", "embd_pdrop", "embed_dropout", "embedding_dropout",
)  # fmt: skip


def fill_targets(model: nn.Module, config: RoutedConfig, model_type: str | None) -> None:
    """Write the default `target_modules` of the model's type into ``config`` where none are given.

    Raises:
        ValueError: where there is no default.
    """
    if config.target_modules == "all-linear" and config.kind != "mlp":
        _maybe_include_all_linear_layers(config, model)
        config.target_modules = sorted(config.target_modules or ())
    if config.kind == "subspace" or config.subspace is not None:
        _check_residual_stream(model, config, model_type)
    if config.target_modules is not None:
        return
    defaults = _DEFAULTS[config.kind]
    if model_type is None or model_type not in defaults:
        raise ValueError(f"no default `target_modules` for the model type {model_type!r}: {_advice(model, config)}")
    config.target_modules = list(defaults[model_type])


def _advice(model: nn.Module, config: RoutedConfig) -> str:
    if config.kind != "mlp":
        return "pass the names of linear layers"
    found = sorted({name.rpartition(".")[2] for name in find_mlps(model)})
    return f"pass them, for example {found}" if found else f"it has no supported MLP. Supported: {SUPPORTED}"


def _check_residual_stream(model: nn.Module, config: RoutedConfig, model_type: str | None) -> None:
    """Refuse models in which a writer's output is not what arrives in the residual stream."""
    norms = sorted({name for path, _ in model.named_modules() if (name := path.rpartition(".")[2]) in POST_NORMS})
    if norms:
        raise ValueError(
            f"{type(model).__name__} normalises what a layer writes before it is added (`{norms[0]}`), so a subspace of the "
            "residual stream is none of the writer's output, and `W + U M` cannot be merged: subspace regions are not built "
            "for such models (Gemma 2 and 3, OLMo 2 and 3)"
        )
    if model_type not in WRITERS:
        raise ValueError(
            f"the residual writers of the model type {model_type!r} are not known; known are {sorted(WRITERS)}"
        )
    settings = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    dropouts = {name: p for name in _DROPOUTS if (p := getattr(settings, name, 0.0))}
    if dropouts and not config.inference_mode:
        raise ValueError(
            f"the model drops out what its layers write ({dropouts}), which turns directions before it into others behind "
            f"it: load it with `{next(iter(dropouts))}=0.0`"
        )


def check_targets(
    model: nn.Module, config: RoutedConfig, targets: dict[str, nn.Module], subspace: Subspace | None = None
) -> None:
    """Refuse ``targets``, modules of ``model`` by name, that a region of this kind cannot go to.

    What the region will be is written back: the provenance of ``subspace``, and whether the base's part is stored.

    Raises:
        ValueError: names the module, and what to do.
    """
    if not targets:
        raise ValueError(
            f"`target_modules` = {config.target_modules} (`exclude_modules` = {config.exclude_modules}, "
            f"`layers_to_transform` = {config.layers_to_transform}) match no module of {type(model).__name__}. "
            f"Its supported MLPs: {list(find_mlps(model)) or 'none'}. Supported layouts: {SUPPORTED}."
        )
    if config.kind == "mlp":
        _check_mlps(targets)
        return
    _check_linear(model, config, targets)
    if subspace is not None or config.provenance is not None:
        _check_subspace(model, config, targets, subspace)


def _check_mlps(targets: dict[str, nn.Module]) -> None:
    verified: set[type] = set()
    for module in targets.values():
        mlp = module.base_layer if isinstance(module, RoutedMLP) else module
        layout = mlp_layout(mlp)
        if type(mlp) not in verified:
            verified.add(type(mlp))
            verify_layout(mlp, layout)


def _check_linear(model: nn.Module, config: RoutedConfig, targets: dict[str, nn.Module]) -> None:
    inner = {name: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for name, m in targets.items()}
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in inner.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"a region of kind {config.kind!r} goes to linear layers (nn.Linear, Conv1D), got {name!r}, a "
                f"{type(module).__name__}: choose other `target_modules`"
            )
        if embeddings is not None and module.weight is getattr(embeddings, "weight", None):
            raise ValueError(
                f"{name!r} shares its weight with the embeddings, so a region on it cannot be merged: leave it out of "
                "`target_modules`"
            )


def _check_subspace(
    model: nn.Module, config: RoutedConfig, targets: dict[str, nn.Module], subspace: Subspace | None
) -> None:
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    writers = {name: module for name, module in targets.items() if is_writer(name, model_type)}
    strangers = sorted(set(targets) - set(writers))
    if config.kind == "subspace" and strangers:
        raise ValueError(
            f"a region of kind 'subspace' goes to residual writers, here those ending in {WRITERS[model_type]}; got "
            f"{strangers[0]!r}: choose among these, or leave `target_modules` out"
        )
    if subspace is not None:
        config.provenance = subspace.describe()
        for name, module in writers.items():
            if width(module, "out") != subspace.width:
                raise ValueError(
                    f"`subspace` is one of a residual stream of width {subspace.width}, that of {name!r} has "
                    f"{width(module, 'out')}: it was made for another model"
                )
            index = layer_index(name)
            assert index is not None
            subspace.at(index)
    if config.kind == "subspace":
        inner = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in writers.values()]
        plain = all(is_plain(cast(Tensor, module.weight)) for module in inner)
        if config.store_base_part and not plain:
            raise ValueError(
                "`store_base_part=True` on a quantised base, whose weights cannot be trained: leave it at None, and train "
                "adapters beside the region"
            )
        config.store_base_part = plain if config.store_base_part is None else config.store_base_part


def free_embeddings(model: nn.Module, size: int) -> dict[str, nn.Embedding | GuardedEmbedding]:
    """Return the embeddings that start the residual stream of width ``size``, of tokens and positions, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | GuardedEmbedding)
        and not name.endswith(".base_layer")
        and module.embedding_dim == size
        and layer_index(name) is None
    }


@contextmanager
def bare_mlps(model: nn.Module) -> Iterator[None]:
    """Take the wrappers of `RoutedMLP` off for the length of a block, so that PEFT finds what is inside under plain names."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, RoutedMLP)
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
            setattr(parent, name, child)
