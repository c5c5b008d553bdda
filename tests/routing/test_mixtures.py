"""Mixtures of experts: adapters on fused experts, and the load-balancing loss of routers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from routing_parts import batch_of, refuse
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from routed_peft import presets
from routed_peft.routing.gradient_routing import GradientRouting

FUSED = {
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 8, "head_dim": 4, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 2},
}
SGTM = presets.sgtm("forget")


def mixture(family: str = "mixtral", **changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 1,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **FUSED[family], **changes}))


def on_attention(name: str = "forget", **changes) -> nn.Module:
    return get_peft_model(mixture(**changes), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name)


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("where", ["region", "base adapter"])
def test_lora_on_fused_experts_is_refused_by_name(family, where):
    fused = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    plain = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(mixture(family), fused if where == "base adapter" else plain, "retain")
    model.add_adapter("forget", fused if where == "region" else plain)
    refuse("has LoRA on the parameter 'down_proj'.*fused experts", model, SGTM, base_adapters=["retain"])


def test_lora_on_attention_blocks_is_refused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["attention"]), "forget")
    refuse(r"'base_model.model.attention' has LoRA on `nn.MultiheadAttention`", model, SGTM, train_base=True)


def test_a_region_without_layers_is_refused():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refuse("'forget' .*has no layer in this model", get_peft_model(mixture(), config, "forget"), train_base=True)


@pytest.mark.parametrize("changes", [{}, {"router_aux_loss_coef": 0.5}])
def test_a_load_balancing_loss_is_refused_at_attaching(changes):
    model = on_attention(output_router_logits=True, **changes)
    refuse(r"load-balancing loss .*`model.config.output_router_logits = False`", model, train_base=False)


def test_a_load_balancing_loss_of_coefficient_zero_is_none():
    model = on_attention(output_router_logits=True, router_aux_loss_coef=0.0)
    table = {"a": SGTM["unlabeled"]}
    with GradientRouting(model, table)(["a"] * 2):
        model(**batch_of(2)).loss.backward()


def test_a_load_balancing_loss_switched_on_later_is_refused():
    model = on_attention()
    routing = GradientRouting(model, {"a": SGTM["unlabeled"]})
    with routing(["a"] * 2), pytest.raises(ValueError, match="do not pass it"):
        model(**batch_of(2), output_router_logits=True)
    with torch.no_grad():
        assert model(**batch_of(2), output_router_logits=True).aux_loss is not None
    model.get_base_model().config.output_router_logits = True
    with pytest.raises(ValueError, match="load-balancing loss"), routing(["a"] * 2):
        pass
    routing.detach()
    assert not model._forward_pre_hooks
    model(**batch_of(2)).loss.backward()
