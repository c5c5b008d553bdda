"""Attentions whose number of heads can grow: what they look like, which are refused, and the numbers in the configuration."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.architectures import is_plain, width
from routed_peft.regions.hidden_units import set_weights
from routed_peft.regions.layer import inner_module

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Children of an attention that can get heads: queries, keys, values and the output."""

_COUNTS = {"num_heads", "num_attention_heads", "num_key_value_heads"}
"""Numbers of heads: an attention that reads one in its forward pass cannot be given more."""

_WAY_OUT = "leave `heads` out, and adapt attention by `r`"


def decoder_config(model: nn.Module) -> Any:
    """Return the configuration of a transformers model's decoder; None for other modules."""
    return model.config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) else None


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the attentions of a model's decoder that have the four `PROJECTIONS`."""
    kind = type(decoder_config(model))
    return {
        name: module
        for name, module in model.named_modules()
        if all(part in module._modules for part in PROJECTIONS) and type(getattr(module, "config", None)) is kind
    }


def head_width(attention: Any, part: str) -> int:
    """Return the features of a projection that belong to one key-value head and the query heads that share it."""
    config = attention.config
    size: int = getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size if part in ("k_proj", "v_proj") else size * (config.num_attention_heads // config.num_key_value_heads)


def head_targets(model: nn.Module) -> list[str]:
    """Return the ends of the names of all projections that get heads; ValueError for a model without any."""
    names = {name.rpartition(".")[2] for name in find_attentions(model)}
    if not names:
        found = [(name, module) for name, module in model.named_modules() if "Attention" in type(module).__name__]
        where = (
            f"{found[0][0]!r} ({type(found[0][1]).__name__}) has {list(found[0][1]._modules)}" if found else "has none"
        )
        raise ValueError(f"`heads` needs attention with projections {', '.join(PROJECTIONS)}, but in "
                         f"{type(model).__name__} {where}: {_WAY_OUT}")  # fmt: skip
    return [f"{name}.{part}" for name in sorted(names) for part in PROJECTIONS]


def check_heads(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where ``targets`` are not the projections of attentions, or these cannot have more heads."""
    attentions = find_attentions(model)
    for name in targets:
        attention, _, _ = name.rpartition(".")
        missing = [part for part in PROJECTIONS if f"{attention}.{part}" not in targets]
        if attention not in attentions or missing:
            raise ValueError(
                f"heads go to all projections {', '.join(PROJECTIONS)} of an attention, but {name!r} is chosen without "
                f"{missing or 'an attention around it'}: leave `target_modules` and `exclude_modules` out"
            )
    for name, module in attentions.items():
        obstacle = _obstacle(module)
        if obstacle is not None:
            raise ValueError(f"{name!r} ({type(module).__name__}) cannot have more heads: {obstacle}: {_WAY_OUT}")
    layers = decoder_config(model).num_hidden_layers
    if len(attentions) != layers:
        raise ValueError(f"{type(model).__name__} has {layers} layers and {len(attentions)} attentions with their own "
                         f"{', '.join(PROJECTIONS)}, so one number of heads cannot describe it: {_WAY_OUT}")  # fmt: skip


def _obstacle(attention: Any) -> str | None:
    """Return why an attention cannot be given more heads, or None."""
    config, inside = attention.config, tuple(f"{part}." for part in PROJECTIONS)
    merged = sorted({n for part in PROJECTIONS for n in getattr(getattr(attention, part), "merged_adapters", ())})
    if merged:
        return f"the regions {merged} are merged into it, so first call `unmerge_adapter()`"
    q, k, v, o = (inner_module(getattr(attention, part)) for part in PROJECTIONS)
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int) or not isinstance(groups, int):
        return f"its configuration has `num_attention_heads` = {heads} and `num_key_value_heads` = {groups}"
    size = head_width(attention, "k_proj")
    tensors = [*attention.named_parameters(), *attention.named_buffers()]
    odd = [n for n, p in tensors if not n.startswith(inside) and (p.shape != (size,) or "." not in n)]
    if odd:
        return f"its `{odd[0]}` belongs to all heads together"
    if not hasattr(config, "head_dim"):
        return f"{type(config).__name__} has no `head_dim`, so no plain checkpoint could have more heads of this width"
    widths = [width(q, "out"), width(k, "out"), width(v, "out"), width(o, "in")]
    if widths != [heads * size, groups * size, groups * size, heads * size]:
        return f"its projections have the widths {widths} for {heads} heads and {groups} key-value heads of {size}"
    forward = inspect.unwrap(type(attention).forward)
    counted = sorted(_COUNTS & {*vars(attention), *forward.__code__.co_names})
    return f"it computes with a `{counted[0]}` of its own" if counted else None


def append_heads(projection: nn.Linear, weight: Tensor, *, bias: Tensor | None, output: bool) -> None:
    """Append rows to a projection of queries, keys or values, or columns to that of the ``output``."""
    joined = torch.cat([projection.weight.data, weight.detach().to(projection.weight)], 1 if output else 0)
    if output or projection.bias is None or bias is None:
        set_weights(projection, joined, None)
    else:
        set_weights(projection, joined, torch.cat([projection.bias.data, bias.detach().to(projection.bias)]))


def check_projection(projection: nn.Module) -> None:
    """Raise ValueError where the weights of ``projection`` are no plain matrix."""
    if not isinstance(projection, nn.Linear) or not is_plain(projection.weight):
        raise ValueError(
            f"heads cannot be merged into {type(projection).__name__}, whose weights are quantized or wrapped. Load the base "
            "unquantized (float32 or bfloat16), or keep the region as an adapter."
        )


def loadable_heads(model: nn.Module, least: int) -> int:
    """Return the first number of key-value heads, from ``least`` on, with which the configuration of ``model`` is valid.

    Some configurations accept few numbers of attention heads only, such as divisors of `hidden_size`. A number above
    ``least`` comes with a warning.

    Raises:
        ValueError: where there is none.
    """
    config = copy.deepcopy(decoder_config(model))
    name, ratio = type(config).__name__, config.num_attention_heads // config.num_key_value_heads
    for heads in range(least, max(least, config.hidden_size // ratio) + 1):
        config.num_attention_heads, config.num_key_value_heads = heads * ratio, heads
        try:
            config.validate()
        except StrictDataclassError:
            continue
        if heads > least:
            warnings.warn(f"{name} accepts no {least * ratio} attention heads: the merged model has {heads * ratio}, the "
                          "last of them zero, which cost time and memory", stacklevel=5)  # fmt: skip
        return heads
    raise ValueError(
        f"{name} accepts no number of attention heads from {least * ratio} on: keep the region as an adapter"
    )


def set_heads(model: nn.Module, heads: int) -> None:
    """Pad all attentions of ``model`` to so many key-value heads with zeros, and write the numbers to its configuration."""
    attentions: dict[str, Any] = find_attentions(model)
    for attention in attentions.values():
        for part in PROJECTIONS:
            projection, output = getattr(attention, part), part == "o_proj"
            missing = heads * head_width(attention, part) - width(projection, "in" if output else "out")
            if missing:
                check_projection(projection)
                other = width(projection, "out" if output else "in")
                zeros = torch.zeros(other, missing) if output else torch.zeros(missing, other)
                append_heads(projection, zeros, bias=torch.zeros(missing), output=output)
    configs = [decoder_config(model), *(attention.config for attention in attentions.values())]
    size = head_width(next(iter(attentions.values())), "k_proj")
    for config in {id(config): config for config in configs}.values():
        config.head_dim = size
        ratio = config.num_attention_heads // config.num_key_value_heads
        config.num_attention_heads, config.num_key_value_heads = heads * ratio, heads
