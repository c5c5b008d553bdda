"""`AttackedModel`: a model in full precision, prepared for attacks in turn and given back unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from routed_peft.evaluation.relearning.attacks import METHODS, Attack
from routed_peft.evaluation.text_loss import check_causal
from routed_peft.unlearning.weight_noise import add_noise


class AttackedModel:
    """A model, changed in place, with a copy of its weights on the CPU, so that many attacks can start from the same ones.

    Weights in low precision become float32: in bfloat16 a step of a small learning rate rounds to nothing, and the attack looks
    weaker than it is.
    """

    def __init__(self, model: nn.Module) -> None:
        check_causal(model)
        assert isinstance(model, PreTrainedModel)
        self.model = model
        self._given = {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}
        self._training = model.training
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        self._state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back, in place."""
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(self._state[name])

    def release(self) -> None:
        """Give the model its original weights, dtypes, trainable parameters and mode back."""
        self.restore()
        for name, parameter in self.model.named_parameters():
            dtype, trained = self._given[name]
            parameter.grad, parameter.data = None, parameter.data.to(dtype)
            parameter.requires_grad_(trained)
        self.model.train(self._training)

    @contextlib.contextmanager
    def prepared_for(self, attack: Attack, seed: int) -> Iterator[Sequence[nn.Parameter]]:
        """Prepare the model for an attack, yield the parameters to train, and undo all of it at the end of the block, draws
        too.
        """
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
            stack.callback(self.restore)
            torch.manual_seed(seed)
            if attack.perturb:
                add_noise(self.model, attack.perturb, beta=1.0, seed=seed)
            if attack.bits:
                quantize(self.model, attack.bits)
            self.model.requires_grad_(False)
            yield stack.enter_context(METHODS[attack.method].prepare(self.model, attack))


@torch.no_grad()
def quantize(model: nn.Module, bits: int) -> None:
    r"""Round the weights of linear layers to ``bits`` bits, in place, and keep them as floats.

    .. math:: w \leftarrow \Delta \operatorname{round}(w / \Delta), \qquad \Delta = \max|w| / (2^{b-1} - 1)

    with one :math:`\Delta` for each output feature, symmetric and to the nearest; coarser than the formats of GPU libraries,
    and the same on every machine. Embeddings, the output head and routers of mixtures of experts stay. Rounding can restore
    removed knowledge: arXiv 2410.16454. A model whose experts share one tensor is a ValueError, since its axes are not known.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[7.0, 2.4]]))
    >>> quantize(nn.Sequential(layer), 4)
    >>> layer.weight.tolist()
    [[7.0, 2.0]]
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if stacked := [name for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name.split(".")]:
        raise ValueError(f"{stacked[0]!r} holds the weights of several experts in one tensor, and only those of linear "
                         "layers can be rounded: round such a model yourself, and attack the result")  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            axis = 0 if isinstance(module, Conv1D) else 1
            step = module.weight.abs().amax(axis, keepdim=True) / (2 ** (bits - 1) - 1)
            tiny = torch.finfo(module.weight.dtype).tiny
            module.weight.copy_((module.weight / step.clamp(min=tiny)).round() * step)
