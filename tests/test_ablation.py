"""`ablated`: the model without its regions, for the length of a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_parts import FAMILIES, logits, lora, without, wrapped
from families import tiny, tokens
from peft import IA3Config, get_peft_model
from torch import nn

from routed_peft.ablation import ablated


@pytest.mark.parametrize("kind", ["mlp", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_equals_the_model_without_the_region(kind: str, family: str) -> None:
    model = wrapped(kind, family)
    whole = logits(model)
    for names in (("forget",), ("bio",), ("forget", "bio")):
        reference = without(model, *names)
        assert not torch.equal(reference, whole)
        with ablated(model, *names):
            assert torch.equal(logits(model), reference)
        assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_blocks_nest_and_scales_multiply(kind: str) -> None:
    model = wrapped(kind)
    with ablated(model, "forget", scale=0.25):
        quarter = logits(model)
    with ablated(model, "forget", scale=0.5), ablated(model, "forget", scale=0.5):
        assert torch.equal(logits(model), quarter)
    with ablated(model, "forget"):
        with ablated(model, "forget", scale=2.0), ablated(model, "bio"):
            assert torch.equal(logits(model), without(model, "forget", "bio"))
        assert torch.equal(logits(model), without(model, "forget"))
    with ablated(model, "forget", scale=1.0):
        assert torch.equal(logits(model), logits(model))


def test_a_region_of_nan_does_not_leak() -> None:
    model = wrapped("mlp")
    reference = without(model, "forget")
    for name, parameter in model.named_parameters():
        if ".forget." in name:
            parameter.data.fill_(float("nan"))
    assert logits(model).isnan().any()
    with ablated(model, "forget"):
        assert torch.equal(logits(model), reference)


def test_hooks_go_even_when_the_block_raises() -> None:
    model = wrapped("lora")
    whole, trainable = logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), ablated(model, "forget"):
        raise KeyError
    assert torch.equal(logits(model), whole)
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert not any(module._forward_hooks for module in model.modules())


def test_in_training_the_ablated_region_gets_no_gradient() -> None:
    model = wrapped("mlp").train()
    with ablated(model, "forget"):
        model(tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".bio." in name for name in gradients) and not any(".forget." in name for name in gradients)


def test_transformers_models_with_add_adapter_and_containers() -> None:
    model = tiny("llama")
    reference = logits(model)
    model.add_adapter(lora(), "forget")
    assert not torch.equal(logits(model), reference)
    with ablated(nn.ModuleList([model]), "forget"):
        assert torch.equal(logits(model), reference)


@pytest.mark.slow
def test_compiled_models_are_ablated_too() -> None:
    model = wrapped("lora")
    reference, compiled = without(model, "forget"), torch.compile(model, backend="eager")
    whole = logits(compiled)
    with ablated(model, "forget"):
        assert torch.equal(logits(compiled), reference)
    assert torch.equal(logits(compiled), whole)


@pytest.mark.parametrize(
    ("names", "scale", "message"),
    [(("forgt",), 0.0, r"\['bio', 'forget'\].*forgt"), ((), 0.0, "`regions`"), (("bio",), float("nan"), "`scale`")],
)
def test_bad_arguments(names: tuple[str, ...], scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message), ablated(wrapped("lora"), *names, scale=scale):
        pass


@pytest.mark.parametrize(
    "other",
    [
        lora(target_modules=["embed_tokens"]),
        lora(use_dora=True),
        lora(target_modules=["q_proj"], target_parameters=["lm_head.weight"], lora_dropout=0.0),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ],
    ids=["embedding", "dora", "parameter", "ia3"],
)
def test_adapters_that_cannot_be_ablated_are_refused(other: Any) -> None:
    model = get_peft_model(tiny("llama"), other, "forget")
    with pytest.raises(ValueError, match=r"cannot be ablated|of another PEFT type"), ablated(model, "forget"):
        pass
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["mlp", "lora"])
def test_a_merged_region_is_refused(kind: str) -> None:
    model = wrapped(kind)
    model.merge_adapter(["forget"])
    with pytest.raises(ValueError, match="merged"), ablated(model, "forget"):
        pass
    with ablated(model, "bio"):
        pass
