"""Models and arguments that TRL's routed trainers take."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from peft import get_peft_model
from trl_parts import PLAIN, VOCABULARY, lora, two_loras

from routed_peft.trl import RoutedGRPOConfig
from routed_peft.trl.mixin import check_arguments, check_grpo_arguments, with_adapters


def config(**options) -> RoutedGRPOConfig:
    return RoutedGRPOConfig("out", **(PLAIN | options))


def base():
    return tiny("llama", vocab_size=VOCABULARY)


def test_adapters_are_added_in_order_and_all_active():
    model = with_adapters(base(), {"retain": lora(), "forget": lora(r=3)}, args=config())
    assert list(model.peft_config) == model.base_model.active_adapters == ["retain", "forget"]
    assert model.peft_config["forget"].r == 3
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    wrapped = two_loras()
    assert with_adapters(wrapped, None, args=config()) is wrapped


def test_the_seed_of_the_arguments_initializes_adapters():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        model = with_adapters(base(), {"forget": lora()}, args=config(seed=seed))
        drawn.append(torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("model", "peft_config", "message"),
    [
        (base, None, "this model has no adapters, so no region"),
        (lambda: "org/model", None, "this model has no adapters"),
        (base, lora(), "`peft_config` maps adapter names to configurations, got LoraConfig"),
        (base, {}, "`peft_config` maps adapter names to configurations"),
        (two_loras, {"other": lora()}, "the model has adapters already"),
    ],
)
def test_models_without_regions_and_configurations_without_names_are_refused(model, peft_config, message):
    with pytest.raises(ValueError, match=message):
        with_adapters(model(), peft_config, args=config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1, "train_base": True}, "no original is left to be the reference"),
        ({"sync_ref_model": True, "beta": 0.1}, "`sync_ref_model` would move the reference"),
        ({"activation_l1": 0.1}, "`activation_l1` is part of ERA"),
    ],
)
def test_options_that_routing_would_make_wrong_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_grpo_arguments(config(**options), None, {})
    for allowed in ({"beta": 0.1}, {"train_base": True}, {"anchor_share": 0.5}):
        args = config(**allowed)
        assert check_grpo_arguments(args, None, {}) is args
    assert check_grpo_arguments(config(beta=0.1, train_base=True), base(), {}).beta == 0.1


def test_references_and_rollout_functions_that_would_not_be_used_as_meant_are_refused():
    with pytest.raises(ValueError, match="`ref_model` is given, but `beta` is 0"):
        check_grpo_arguments(config(), base(), {})
    with pytest.raises(ValueError, match="`anchor_share` with `rollout_func`"):
        check_grpo_arguments(config(anchor_share=0.5), None, {"rollout_func": print})
    assert check_grpo_arguments(config(), None, {"rollout_func": print})
    with pytest.raises(ValueError, match="`args` is a `RoutedGRPOConfig`, got NoneType"):
        check_grpo_arguments(None, None, {})


def test_an_adapter_on_the_head_is_refused_and_others_are_not():
    check_arguments(config(), two_loras())
    check_arguments(config(), "org/model")
    on_head = get_peft_model(base(), lora(target_modules=["lm_head"]), "forget")
    with pytest.raises(ValueError, match=r"sits on the output embeddings \(`lm_head`\)"):
        check_arguments(config(), on_head)
    with pytest.raises(ValueError, match="`use_liger_kernel` reads weights outside their modules"):
        args = config()
        args.use_liger_kernel = True
        check_arguments(args, two_loras())
