from __future__ import annotations

import pytest
import torch
from families import tiny
from peft import get_peft_model
from trl_parts import (
    VOCABULARY,
    answering,
    assert_same,
    logps,
    lora,
    plain_logps,
    trainer_of,
    two_loras,
    weights,
)

from routed_peft import Route, RoutedConfig

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")


LOSS_WITHOUT = {"flagged": Route(weights={"base": 0.0}), "unflagged": Route(ablated=("forget",))}


def with_dropout(name: str):
    """Return a model whose LoRA, or whose own attention, drops out."""
    if name == "attention_dropout":
        return two_loras(attention_dropout=0.1)
    model = get_peft_model(tiny("llama", vocab_size=VOCABULARY), lora(lora_dropout=0.1), "retain")
    model.add_adapter("forget", lora())
    model.base_model.set_adapter(["retain", "forget"])
    return model


@pytest.mark.parametrize("name", ["lora_dropout", "attention_dropout"])
@pytest.mark.parametrize(
    ("options", "routes", "cause"),
    [
        ({"anchor_share": 0.5}, None, "`anchor_share`"),
        ({"num_iterations": 2}, None, "`num_iterations`"),
        ({"steps_per_generation": 4}, None, "`steps_per_generation`"),
        ({}, LOSS_WITHOUT, "the route 'unflagged'"),
    ],
)
def test_refuses_dropout_where_rollouts_are_scored_twice(tmp_path, name, options, routes, cause):
    with pytest.raises(ValueError, match=f"{cause} .*scored twice.*{name}.* drops out"):
        trainer_of(tmp_path, with_dropout(name), routes, **options)


@pytest.mark.slow
def test_dropout_is_fine_where_rollouts_are_scored_once_or_it_is_disabled(tmp_path):
    trainer_of(tmp_path, with_dropout("lora_dropout"), max_steps=1).train()
    trainer = trainer_of(tmp_path, with_dropout("lora_dropout"), num_iterations=2, disable_dropout=True, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["clip_ratio/high_max"] == 0
    own_anchors = trainer_of(
        tmp_path, with_dropout("lora_dropout"), label_fn=answering(lambda ids: ["anchor"] * len(ids))
    )
    with pytest.raises(ValueError, match="a label whose route ablates other regions than the sampler"):
        own_anchors.train()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_original_model(tmp_path, checkpointing):
    trainer = trainer_of(
        tmp_path, beta=0.1, anchor_share=0.5, baseline_over="unflagged", gradient_checkpointing=checkpointing
    )
    trainer.train()
    original = two_loras().eval()
    with original.disable_adapter():
        for batch in trainer.seen:
            for row in range(8):
                found = batch["ref_per_token_logps"][row][batch["completion_mask"][row].bool()]
                torch.testing.assert_close(found, logps(original, batch, row).detach(), rtol=0, atol=1e-5)
    assert trainer.state.log_history[0]["kl"] > 0
    assert trainer.args.beta == 0.1


@pytest.mark.slow
def test_a_trained_base_takes_a_reference_of_its_own(tmp_path):
    def expanded():
        torch.manual_seed(0)
        config = RoutedConfig(kind="mlp", size=4, init="model", task_type="CAUSAL_LM")
        return get_peft_model(tiny("llama", vocab_size=VOCABULARY), config, "forget")

    options = {"train_base": True, "base_adapters": [], "beta": 0.1}
    with pytest.raises(ValueError, match="no original is left to be the reference"):
        trainer_of(tmp_path, expanded(), **options)
    torch.manual_seed(0)
    reference = tiny("llama", vocab_size=VOCABULARY)
    trainer = trainer_of(tmp_path, expanded(), more={"ref_model": reference}, **options)
    before = weights(reference)
    trainer.train()
    assert_same(before, weights(reference))
    batch = trainer.seen[-1]
    found = batch["ref_per_token_logps"][0][batch["completion_mask"][0].bool()]
    torch.testing.assert_close(found, plain_logps(reference, batch, 0).detach(), rtol=0, atol=1e-5)


def test_every_chunk_is_scored_with_the_gates_of_its_own_rows(tmp_path):
    """Chunks of two rows: without anchors, with anchors alone, and mixed."""
    trainer = trainer_of(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "prompt_ids": torch.randint(4, VOCABULARY, (6, 3), generator=generator),
        "completion_ids": torch.randint(4, VOCABULARY, (6, 4), generator=generator),
    }
    batch["prompt_mask"] = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]])
    batch["completion_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]] * 2)
    trainer._anchor = torch.tensor([False, False, True, True, True, False])
    found = trainer._sampled_logps(batch)
    model = two_loras().eval()
    for row, anchor in enumerate(trainer._anchor.tolist()):
        expected = logps(model, batch, row, *(["forget"] if anchor else []))
        other = logps(model, batch, row, *([] if anchor else ["forget"]))
        own = found[row][batch["completion_mask"][row].bool()]
        torch.testing.assert_close(own, expected.detach(), rtol=0, atol=1e-5)
        assert (own - other).abs().max() > 1e-3, "the gates matter"
