r"""The parts of a transformer that regions and routing need to find: MLPs, residual writers and decoder layers.

Every supported MLP computes, with ``up`` ``(H -> I)`` and ``down`` ``(I -> H)``, and ``gate`` ``(H -> I)`` where there
is one,

.. math:: y = W_d \,\bigl(\sigma(W_g x) \odot W_u x\bigr) \quad\text{or}\quad y = W_d\, \sigma(W_u x)

so that hidden units can be added and removed one at a time. `register_mlp_layout` adds an architecture.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from routed_peft.eval_mode import evaluating

_LLAMA_LIKE = "llama mistral qwen2 qwen3 gemma olmo smollm3 granite phi3 stablelm".split()

WRITERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LLAMA_LIKE, ("self_attn.o_proj", "mlp.down_proj")),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
}
"""By model type, the ends of the names of the residual writers: linear layers whose output is added to the stream as it is."""

# the last four norm the output of their MLPs, so that none of their layers is a residual writer
MLP_TARGETS = {model_type: ["mlp"] for model_type in (*WRITERS, "gemma2", "gemma3_text", "olmo2", "olmo3")}
"""By model type, the ends of the names of the MLPs: the default targets of regions of kind mlp."""

_EXPERTS = ("experts", "router", "shared_expert", "block_sparse_moe")
"""Names by which a mixture-of-experts block is recognized."""

_LAYER_NAME = r"\.(?:layers|h|blocks)\.(\d+)"


@dataclass(frozen=True, slots=True)
class MLPLayout:
    """The names of an MLP's parts.

    Attributes:
        gate: projection whose activation multiplies ``up``; None where there is none, or where it is part of ``up``.
        up: projection into the hidden units.
        down: projection out of the hidden units.
        act: attribute that holds the activation, a callable.
        fused: whether ``up`` holds gate and up in one matrix, gate first.
    """

    gate: str | None
    up: str
    down: str
    act: str
    fused: bool = False

    @property
    def gated(self) -> bool:
        """True where the activation of a gate multiplies ``up``."""
        return self.fused or self.gate is not None


_Projections = tuple[str | None, str, str, bool]  # gate, up, down, fused

_LAYOUTS: dict[_Projections, list[str]] = {
    ("gate_proj", "up_proj", "down_proj", False): "Llama Mistral Qwen Gemma OLMo SmolLM Granite".split(),
    (None, "gate_up_proj", "down_proj", True): ["Phi-3"],
    (None, "c_fc", "c_proj", False): ["GPT-2", "GPT-Neo"],
    (None, "fc1", "fc2", False): ["Phi"],
    (None, "dense_h_to_4h", "dense_4h_to_h", False): ["GPT-NeoX", "Falcon"],
}
"""The names of the projections of every known layout, and the families that have it, for messages."""

_ACTIVATIONS = ["act_fn", "activation_fn", "act", "gelu_impl"]


def register_mlp_layout(
    model_type: str, layout: MLPLayout, *, targets: Sequence[str] = ("mlp",), writers: Sequence[str] = ()
) -> None:
    """Support an architecture. Call this once, before a region is made.

    Args:
        model_type: ``config.model_type`` of its models.
        layout: the names of the parts of its MLP. The MLP has to compute `mlp_forward`; every new region checks this.
        targets: ends of the names of its MLPs, the default `target_modules` of regions of kind mlp.
        writers: ends of the names of its residual writers, for regions of kind subspace; that kind is refused without.

    Raises:
        ValueError: for a model type that is registered already.

    >>> register_mlp_layout("toy", MLPLayout(gate=None, up="wide", down="thin", act="squash"), targets=["ffn"])
    >>> "wide/thin (toy)" in supported_layouts()
    True
    """
    if model_type in MLP_TARGETS:
        raise ValueError(
            f"the model type {model_type!r} is registered already, with the targets {MLP_TARGETS[model_type]}: choose another "
            "name, or pass `target_modules` to `RoutedConfig`"
        )
    _LAYOUTS.setdefault((layout.gate, layout.up, layout.down, layout.fused), []).append(model_type)
    if layout.act not in _ACTIVATIONS:
        _ACTIVATIONS.append(layout.act)
    MLP_TARGETS[model_type] = list(targets)
    if writers:
        WRITERS[model_type] = tuple(writers)


def supported_layouts() -> str:
    """Return the known MLP layouts and their families as text, for messages."""
    return ", ".join(
        f"{'/'.join(name for name in names[:3] if name)} ({', '.join(families)})"
        for names, families in _LAYOUTS.items()
    )


def model_type(model: nn.Module) -> str | None:
    """Return the model type in the configuration of a transformers model; None for any other module."""
    return getattr(getattr(model, "config", None), "model_type", None)


def mlp_layout(mlp: nn.Module) -> MLPLayout:
    """Recognize the layout of ``mlp`` by the names of its children.

    Raises:
        ValueError: where the module is not an MLP of a known layout; the message names its class and the known layouts.
    """
    children = dict(mlp.named_children())
    known = (names for names in _LAYOUTS if all(name in children for name in names[:3] if name))
    projections = next(known, None)
    if projections is None:
        stacked = any(p.dim() == 3 for p in mlp.parameters(recurse=False))  # experts' matrices in one tensor
        experts = stacked or any(hasattr(mlp, name) for name in _EXPERTS)
        raise ValueError(_refusal(mlp, "mixture-of-experts blocks" if experts else None))
    gate, up, down, fused = projections
    act = next((name for name in _ACTIVATIONS if callable(getattr(mlp, name, None))), None)
    if act is None:
        raise ValueError(_refusal(mlp, f"an MLP without an activation under one of the names {tuple(_ACTIVATIONS)}"))
    others = [n for n, child in children.items() if n not in (gate, up, down, act) and [*child.parameters()]]
    if others:
        raise ValueError(
            _refusal(mlp, f"a block that holds more than an MLP (here {others}; OPT's layers are like this)")
        )
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(type(mlp).forward).parameters.values()
    if sum(p.kind in kinds and p.default is p.empty for p in arguments) != 2:  # `self` and the input
        raise ValueError(_refusal(mlp, "an MLP that adds the residual itself (Bloom, MPT)"))
    return MLPLayout(gate, up, down, act, fused)


def _refusal(mlp: nn.Module, what: str | None) -> str:
    reason = f": {what} cannot be widened unit by unit" if what else ""
    return (
        f"{type(mlp).__name__} with children {[name for name, _ in mlp.named_children()]} is not a supported MLP"
        f"{reason}. Supported are {supported_layouts()}. Choose other `target_modules`, use a LoRA adapter as the region, or "
        "`routed_peft.architectures.register_mlp_layout`."
    )


def find_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the supported MLPs of ``model`` by qualified name, those in a PEFT wrapper (``….base_layer``) included.

    Modules of other layouts are left out without an error. The insides of an MLP are not searched.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or not name:
            continue
        try:
            mlp_layout(module)
        except ValueError:
            continue
        found[name] = module
    return found


def output_projection(mlp: nn.Module) -> nn.Module:
    """Return the projection of an MLP out of its hidden units; errors as `mlp_layout`."""
    return mlp.get_submodule(mlp_layout(mlp).down)


def mlp_forward(mlp: nn.Module, layout: MLPLayout, x: Tensor) -> Tensor:
    """Compute the output of ``mlp`` as ``layout`` describes it; ``x`` is ``(..., H)``."""
    act, up = getattr(mlp, layout.act), getattr(mlp, layout.up)(x)
    gate = getattr(mlp, layout.gate)(x) if layout.gate else None
    if layout.fused:
        gate, up = up.chunk(2, dim=-1)
    return getattr(mlp, layout.down)(act(up) if gate is None else act(gate) * up)


@torch.no_grad()
def verify_layout(mlp: nn.Module, layout: MLPLayout) -> None:
    """Raise ValueError where ``mlp`` and `mlp_forward` under ``layout`` differ on two random inputs, without dropout.

    Modules with the same names may do more (a residual, a scale, sparsity). Nothing is compared where weights are on the
    meta device or are not plain floating-point matrices. The global random state is left as it was.
    """
    up = getattr(mlp, layout.up)
    weight = getattr(up, "weight", None)
    if weight is None or not is_plain(weight) or any(p.is_meta for p in mlp.parameters()):
        return
    x = torch.randn(2, 1, width(up, "in"), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with evaluating(mlp):
        got, expected = mlp(x), mlp_forward(mlp, layout, x)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 0.05
    scale = float(expected.abs().nan_to_num().max())
    if not isinstance(got, Tensor) or not torch.allclose(got, expected, tolerance, tolerance * scale, equal_nan=True):
        raise ValueError(f"{type(mlp).__name__} has the names of a known MLP but computes something else than "
                         f"{layout}: hidden units cannot be added to it. Choose other `target_modules`, or use a LoRA "
                         "adapter as the region.")  # fmt: skip


def is_plain(weight: Tensor | None) -> bool:
    """Return whether ``weight`` is an ordinary floating-point tensor, neither quantized nor packed."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return weight is not None and type(weight) in (nn.Parameter, Tensor) and weight.dtype in dtypes


def width(projection: nn.Module, side: str) -> int:
    """Return the number of input (``"in"``) or output (``"out"``) features of a Linear, a Conv1D or a wrapper of one."""
    conv1d = {"in": "nx", "out": "nf"}[side]
    return int(getattr(projection, conv1d if hasattr(projection, conv1d) else f"{side}_features"))


def layer_index(name: str) -> int | None:
    """Return the index of the decoder layer that holds a module or parameter of this name, or None.

    >>> layer_index("model.layers.3.mlp.down_proj"), layer_index("lm_head")
    (3, None)
    """
    found = re.search(rf"{_LAYER_NAME}\.", f".{name}.")
    return int(found[1]) if found else None


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the decoder layers of a model by index; ValueError where it has none under the usual names."""
    named = [(re.fullmatch(rf".*{_LAYER_NAME}", name), module) for name, module in model.named_modules()]
    found = {int(match[1]): module for match, module in named if match}
    if not found:
        raise ValueError(f"{type(model).__name__} has no decoder layers under the names `layers`, `h` or `blocks`")
    return found


def is_writer(name: str, of_type: str) -> bool:
    """Return whether a module of this name, in a model of this type, writes into the residual stream."""
    return any(name.endswith(f".{end}") for end in WRITERS.get(of_type, ()))


def find_writers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the residual writers of a transformers model by name; with adapters in it, under the plain model's names.

    Raises:
        ValueError: where `WRITERS` has no entry for the model's type.
    """
    kind = str(model_type(model))
    if kind not in WRITERS:
        raise ValueError(f"the residual writers of the model type {kind!r} are not known; known are {sorted(WRITERS)}")
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = name.replace(".base_layer", "")  # a wrapped module comes twice, and the wrapper comes first
        if is_writer(plain, kind):
            found.setdefault(plain, module)
    return found
