"""Which parts of a transformer's MLP do what: the layouts of the supported families, recognised by their structure.

Every supported MLP computes, with ``up`` ``(H -> I)`` and ``down`` ``(I -> H)``, and ``gate`` ``(H -> I)`` where there
is one,

.. math:: y = W_d \\,\\bigl(\\sigma(W_g x) \\odot W_u x\\bigr) \\quad\\text{or}\\quad y = W_d\\, \\sigma(W_u x)

so that hidden units can be added and taken away one at a time.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from routed_peft.eval_mode import evaluating

SUPPORTED = (
    "gate_proj/up_proj/down_proj (Llama, Mistral, Qwen, Gemma, OLMo, SmolLM, Granite), gate_up_proj/down_proj (Phi-3), "
    "c_fc/c_proj (GPT-2, GPT-Neo), fc1/fc2 (Phi), dense_h_to_4h/dense_4h_to_h (GPT-NeoX, Falcon)"
)
"""The layouts that `mlp_layout` knows, for error messages."""

_PROJECTIONS = (  # gate, up, down, fused
    ("gate_proj", "up_proj", "down_proj", False),
    (None, "gate_up_proj", "down_proj", True),
    (None, "c_fc", "c_proj", False),
    (None, "fc1", "fc2", False),
    (None, "dense_h_to_4h", "dense_4h_to_h", False),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl")
_EXPERTS = ("experts", "router", "shared_expert", "block_sparse_moe")

_LLAMA_LIKE = "llama mistral qwen2 qwen3 gemma olmo smollm3 granite phi3 stablelm"

WRITERS = {
    **dict.fromkeys(_LLAMA_LIKE.split(), ("self_attn.o_proj", "mlp.down_proj")),
    "starcoder2": ("self_attn.o_proj", "mlp.c_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
}
"""By model type, the ends of the names of the linear layers whose output is added to the residual stream as it is."""

POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")
"""Children of a decoder layer that normalise a writer's output before it is added (Gemma 2 and 3, OLMo 2 and 3, GLM-4)."""

_LAYER_INDEX = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class MLPLayout:
    """The names of an MLP's parts.

    Attributes:
        gate: projection whose activation multiplies ``up``, or None where there is none of its own.
        up: projection into the hidden units.
        down: projection out of the hidden units.
        act: attribute that holds the activation, a callable.
        fused: whether ``up`` holds gate and up in one matrix, gate first.
    """

    gate: str | None
    up: str
    down: str
    act: str
    fused: bool

    @property
    def gated(self) -> bool:
        """Whether the activation of a gate multiplies ``up``."""
        return self.fused or self.gate is not None


def mlp_layout(mlp: nn.Module) -> MLPLayout:
    """Recognise the layout of ``mlp`` by the names of its children.

    Raises:
        ValueError: where the module is no MLP of a known layout; the message names its class and what is supported.

    Example:
        >>> from transformers import LlamaConfig
        >>> from transformers.models.llama.modeling_llama import LlamaMLP
        >>> mlp_layout(LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=6)))
        MLPLayout(gate='gate_proj', up='up_proj', down='down_proj', act='act_fn', fused=False)
    """
    children = dict(mlp.named_children())
    known = (names for names in _PROJECTIONS if all(name in children for name in names[:3] if name))
    gate, up, down, fused = next(known, (None, None, None, False))
    if up is None or down is None:
        raise ValueError(_refusal(mlp, "mixture-of-experts blocks" if _is_moe(mlp) else None))
    act = next((name for name in _ACTIVATIONS if callable(getattr(mlp, name, None))), None)
    if act is None:
        raise ValueError(_refusal(mlp, f"an MLP without an activation under one of the names {_ACTIVATIONS}"))
    others = [
        n for n, child in children.items() if n not in (gate, up, down, act) and any(True for _ in child.parameters())
    ]
    if others:
        raise ValueError(
            _refusal(mlp, f"a block that holds more than an MLP (here {others}; OPT's layers are like this)")
        )
    if len(_required_arguments(mlp)) != 1:
        raise ValueError(_refusal(mlp, "an MLP that adds the residual itself (Bloom, MPT)"))
    return MLPLayout(gate, up, down, act, fused)


def _is_moe(mlp: nn.Module) -> bool:
    return any(hasattr(mlp, name) for name in _EXPERTS) or any(p.dim() == 3 for p in mlp.parameters(recurse=False))


def _required_arguments(mlp: nn.Module) -> list[str]:
    parameters = list(inspect.signature(type(mlp).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _refusal(mlp: nn.Module, what: str | None) -> str:
    reason = f": {what} cannot be widened unit by unit" if what else ""
    return (
        f"{type(mlp).__name__} with children {[name for name, _ in mlp.named_children()]} is not a supported MLP"
        f"{reason}. Supported are {SUPPORTED}. Choose other `target_modules`, or use a LoRA adapter as the region."
    )


def find_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the supported MLPs of ``model`` by qualified name, also those in a PEFT wrapper (``….base_layer``).

    Modules of other layouts are left out; nothing is raised. The inner parts of an MLP are not looked into.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=4, intermediate_size=6, num_attention_heads=1, vocab_size=8)
    >>> list(find_mlps(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))))
    ['model.layers.0.mlp', 'model.layers.1.mlp']
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


def mlp_forward(mlp: nn.Module, layout: MLPLayout, x: Tensor) -> Tensor:
    """Compute what ``layout`` says that ``mlp`` computes; ``x`` is ``(..., H)``."""
    act, up = getattr(mlp, layout.act), getattr(mlp, layout.up)(x)
    if layout.fused:
        gate, up = up.chunk(2, dim=-1)
        hidden = act(gate) * up
    else:
        hidden = act(getattr(mlp, layout.gate)(x)) * up if layout.gate else act(up)
    return getattr(mlp, layout.down)(hidden)


@torch.no_grad()
def verify_layout(mlp: nn.Module, layout: MLPLayout) -> None:
    """Compare ``mlp`` with what ``layout`` says of it, on two random inputs and without dropout.

    Modules with the same names may do other things (a residual, a scale, sparsity). Nothing is compared where weights
    are on the meta device or are not plain floating-point matrices. The global random state is left as it was.

    Raises:
        ValueError: where the two disagree.

    Example:
        >>> class Scaled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.fc2, self.act = nn.Linear(4, 6), nn.Linear(6, 4), nn.ReLU()
        ...     def forward(self, x):
        ...         return 2 * self.fc2(self.act(self.fc1(x)))
        >>> verify_layout(Scaled(), mlp_layout(Scaled()))
        Traceback (most recent call last):
        ...
        ValueError: Scaled has the names of a known MLP but computes something else ...
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
        raise ValueError(
            f"{type(mlp).__name__} has the names of a known MLP but computes something else than {layout}: its hidden "
            "units cannot be extended. Choose other `target_modules`, or use a LoRA adapter as the region."
        )


def is_plain(weight: Tensor | None) -> bool:
    """Whether ``weight`` is an ordinary floating-point tensor, not a quantised or packed one.

    >>> is_plain(nn.Linear(1, 1).weight), is_plain(torch.zeros(2, dtype=torch.int8))
    (True, False)
    """
    ordinary = type(weight) in (nn.Parameter, Tensor)
    return (
        weight is not None
        and ordinary
        and weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )


def width(projection: nn.Module, side: str) -> int:
    """Return the number of features that go ``"in"`` or come ``"out"`` of a Linear, a Conv1D or a wrapper of one.

    >>> width(nn.Linear(2, 3), "out")
    3
    """
    conv1d = {"in": "nx", "out": "nf"}[side]
    return int(getattr(projection, conv1d if hasattr(projection, conv1d) else f"{side}_features"))


def layer_index(name: str) -> int | None:
    """Return the index of the decoder layer that a module or parameter of this name is in, or None.

    >>> layer_index("model.layers.3.mlp.down_proj"), layer_index("lm_head")
    (3, None)
    """
    found = _LAYER_INDEX.search(f".{name}.")
    return int(found[1]) if found else None


def is_writer(name: str, model_type: str) -> bool:
    """Whether a module of this name, in a model of this type, writes into the residual stream.

    >>> is_writer("model.layers.0.mlp.down_proj", "llama"), is_writer("model.layers.0.mlp.up_proj", "llama")
    (True, False)
    """
    return any(name.endswith(f".{end}") for end in WRITERS.get(model_type, ()))


def find_writers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the residual writers of a plain transformers model by name, or of one with adapters under plain names.

    Raises:
        ValueError: where the model's type is none that `WRITERS` knows.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=4, intermediate_size=6, num_attention_heads=1, vocab_size=8)
        >>> list(find_writers(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))))
        ['model.layers.0.self_attn.o_proj', 'model.layers.0.mlp.down_proj']
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if model_type not in WRITERS:
        raise ValueError(
            f"the residual writers of the model type {model_type!r} are not known; known are {sorted(WRITERS)}"
        )
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = name.replace(".base_layer", "")  # a wrapped module comes twice, the wrapper first
        if is_writer(plain, model_type):
            found.setdefault(plain, module)
    return found
