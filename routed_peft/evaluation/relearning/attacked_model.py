"""The model under attack: in full precision while it lasts, prepared, and given back as it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from routed_peft.evaluation.relearning.attacks import Attack
from routed_peft.evaluation.text_loss import check_causal, vocabulary
from routed_peft.unlearning.weight_noise import add_noise


class Victim:
    """A model whose weights are kept aside on the CPU, so that many attacks can start from the same ones.

    Weights in low precision become float32: in bfloat16 a step of a small learning rate rounds to nothing, and the attack
    looks weaker than it is.

    Args:
        model: a plain causal language model of transformers; it is changed in place.

    Raises:
        ValueError: for a model with adapters, quantised weights, or one that is not a causal language model.

    Example:
        >>> Victim(nn.Linear(1, 1))
        Traceback (most recent call last):
        ...
        ValueError: `model` must be a causal language model of transformers, got Linear
    """

    def __init__(self, model: nn.Module) -> None:
        check_causal(model)
        assert isinstance(model, PreTrainedModel)
        self.model = model
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = model.training
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        self._state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back that the model came with, in place."""
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(self._state[name])

    def release(self) -> None:
        """Give the model back as it came: weights, dtypes, what is trained, and its mode."""
        self.restore()
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            parameter.data = parameter.data.to(self._dtypes[name])
            parameter.requires_grad_(self._trained[name])
        self.model.train(self._training)

    @contextlib.contextmanager
    def under(self, attack: Attack, seed: int) -> Iterator[list[nn.Parameter]]:
        """Prepare the model for an attack, give its parameters to train, and undo all of it in the end.

        The random numbers of the process are seeded meanwhile, and go on as before afterwards.
        """
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
            stack.callback(self.restore)
            torch.manual_seed(seed)
            if attack.perturb:
                add_noise(self.model, attack.perturb, beta=1.0, seed=seed)
            if attack.bits:
                quantise(self.model, attack.bits)
            self.model.requires_grad_(attack.method == "full")
            if attack.method == "lora":
                yield stack.enter_context(_lora(self.model, attack.lora_rank))
            elif attack.method == "bias":
                yield [stack.enter_context(_output_bias(self.model))]
            else:
                yield [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@torch.no_grad()
def quantise(model: nn.Module, bits: int) -> None:
    r"""Round the weights of linear layers to ``bits`` bits, in place, and keep them as floats.

    .. math:: w \leftarrow \Delta \operatorname{round}(w / \Delta), \qquad \Delta = \max|w| / (2^{b-1} - 1)

    with one :math:`\Delta` for each output feature, symmetric and to the nearest; embeddings and the output head stay, as is
    usual. Coarser than the formats of GPU libraries, and the same on every machine. That rounding can bring back what
    unlearning took: arXiv 2410.16454. Routers of mixtures of experts stay too.

    Raises:
        ValueError: for a model whose experts share one tensor, of which it is not known which axis is which.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[7.0, 2.4]]))
    >>> quantise(nn.Sequential(layer), 4)
    >>> layer.weight.tolist()
    [[7.0, 2.0]]
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    stacked = [name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name.split(".")]
    if stacked:
        raise ValueError(
            f"rounding knows the weights of linear layers, and {stacked[0]!r} holds those of several experts in one tensor: "
            "round such a model yourself, and attack that"
        )
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            module.weight.copy_(_rounded(module.weight, bits, axis=0 if isinstance(module, Conv1D) else 1))


def _rounded(weight: Tensor, bits: int, axis: int) -> Tensor:
    step = weight.abs().amax(axis, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / step.clamp(min=torch.finfo(weight.dtype).tiny)).round() * step


@contextlib.contextmanager
def _lora(model: PreTrainedModel, rank: int) -> Iterator[list[nn.Parameter]]:
    """Put LoRA adapters beside all linear layers but the head for the length of a block."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT then sets it
        wrapped = get_peft_model(model, config, adapter_name="attack")
    try:
        yield [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    finally:
        wrapped.unload()


@contextlib.contextmanager
def _output_bias(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Add one number per vocabulary entry to the logits for the length of a block."""
    head = next(model.parameters())
    bias = nn.Parameter(torch.zeros(vocabulary(model), device=head.device, dtype=head.dtype))

    def add(_: nn.Module, __: object, output: object) -> object:
        output.logits = output.logits + bias  # type: ignore[attr-defined]
        return output

    handle = model.register_forward_hook(add)
    try:
        yield bias
    finally:
        handle.remove()
