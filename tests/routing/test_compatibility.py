from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from families import tiny
from peft import LoraConfig, get_peft_model
from routing_parts import ROUTES, lora, refuse, two_regions
from subspace_parts import subspace_file, with_subspace
from torch import nn

from routed_peft import presets
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting


def test_offloaded_models_are_refused():
    """accelerate's hooks sit on the instances, where the swapped class would not be asked."""
    model = two_regions("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"'base_model.model.*' has a forward of its own .*without `device_map` offload"
    ):
        GradientRouting(model, ROUTES, train_base=True)


def test_refusals():
    refuse("cannot be called 'default'", lora("default"), train_base=True)
    refuse("no region", lora("retain"), base_adapters=["retain"])
    refuse("`base_adapters` has 'retian'", lora(), base_adapters=["retian"])
    refuse("names 'bio'", lora(), presets.sgtm("bio"), train_base=True)
    refuse("DoRA", lora(use_dora=True), train_base=True)
    refuse("modules_to_save", lora(modules_to_save=["lm_head"]), train_base=True)
    refuse("retain' blocks everything", lora())
    refuse("matches no module", lora(), train_base=True, joint=["embedings"])
    refuse("matches no module", lora(), train_base=True, layers=[2])
    refuse("`edges` is", lora(), train_base=True, edges="activation")
    routes = {"a": Route(), "b": Route(ablated=("forget",))}
    refuse("no route trains the region 'forget'", lora(), {"b": routes["b"]}, train_base=True)

    model = lora()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    refuse("model.norm.weight is trainable, but it belongs to no adapter", model, routes | {"b": Route()})

    model = lora()
    model.base_model.model.to(torch.bfloat16)
    refuse("torch.bfloat16 and trained", model, train_base=True)

    model = lora()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    refuse("forward of its own", model, train_base=True)

    model = lora()
    model.base_model.model.model.extra = nn.Parameter(torch.zeros(3))
    refuse("cannot be routed", model, train_base=True)

    model = get_peft_model(tiny("qwen3"), RoutedConfig(size=2), adapter_name="forget")
    refuse("shares a weight", model, train_base=True, joint=["embeddings"])
    GradientRouting(model, presets.sgtm("forget"), train_base=True, joint=["embeddings", "head"])
    refuse("is attached to this model already", model, train_base=True)

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["embed_tokens"]), adapter_name="forget")
    refuse("cannot be routed", model, train_base=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT, which goes on
@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_lora_on_a_head_tied_to_the_embeddings_is_refused(family, tmp_path):
    head = LoraConfig(r=2, target_modules=["lm_head"])

    def on_the_head(name: str, **options) -> nn.Module:
        return get_peft_model(tiny(family, **options), head, adapter_name=name)

    message = "'base_model.model.lm_head' shares its weight with the embeddings"
    refuse(message, on_the_head("forget"), train_base=True)
    model = on_the_head("retain")
    model.add_adapter("forget", LoraConfig(r=2, target_modules=["up_proj"]))
    refuse(message, model, base_adapters=["retain"])
    GradientRouting(on_the_head("forget", tie_word_embeddings=False), presets.sgtm("forget"), train_base=True)
    mlp = get_peft_model(tiny(family), RoutedConfig(size=2), adapter_name="forget")
    GradientRouting(mlp, presets.sgtm("forget"), train_base=True)
    subspace = with_subspace(tiny(family), subspace_file(tmp_path), "forget")  # guards the embeddings
    GradientRouting(subspace, presets.sgtm("forget"), train_base=True)


def test_refusals_of_wrapped_merged_and_quantized_models():
    with pytest.raises(ValueError, match="DataParallel shares one step's labels"):
        GradientRouting(nn.DataParallel(lora()), presets.sgtm("forget"), train_base=True)
    model = lora()
    model.merge_adapter()
    refuse("adapters are merged into", model, train_base=True)
    model = lora()
    model.base_model.model.is_quantized = True
    refuse("on a quantized model", model, train_base=True)
    refuse("blocks everything", model)  # a frozen one needs `base_adapters`, no more
