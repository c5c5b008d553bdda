"""Methods of attacks: full fine-tuning, LoRA, a bias on the logits, and no training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from routed_peft.evaluation.relearning.attacks import Attack, AttackMethod, register_attack
from routed_peft.evaluation.text_loss import vocabulary


@contextlib.contextmanager
def _full(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """Train all parameters."""
    model.requires_grad_(True)
    yield list(model.parameters())


@contextlib.contextmanager
def _lora(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """Train LoRA adapters beside all linear layers but the head."""
    rank = attack.lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT then sets it
        wrapped = get_peft_model(model, config, adapter_name="attack")
    try:
        yield [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    finally:
        wrapped.unload()


@contextlib.contextmanager
def _bias(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """Train one number per vocabulary entry, added to the logits."""
    head = next(model.parameters())
    bias = nn.Parameter(torch.zeros(vocabulary(model), device=head.device, dtype=head.dtype))

    def add(_: nn.Module, __: object, output: object) -> object:
        output.logits = output.logits + bias  # type: ignore[attr-defined]
        return output

    handle = model.register_forward_hook(add)
    try:
        yield [bias]
    finally:
        handle.remove()


register_attack("full", method=AttackMethod(_full, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)))
register_attack("lora", method=AttackMethod(_lora, (1e-4, 3e-4, 1e-3, 3e-3)))
register_attack("bias", method=AttackMethod(_bias, (1e-2, 3e-2, 1e-1, 3e-1)))
register_attack("none", method=AttackMethod(lambda model, attack: contextlib.nullcontext([]), (0.0,)))
