from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from training_parts import arguments, assert_same, model_of, rows, train, weights

from routed_peft import RoutedConfig, RoutedTrainer, load_routed, presets


@pytest.mark.parametrize("kind", ["trained base", "retain adapter", "two regions"])
def test_resumed_equals_uninterrupted(tmp_path, tokenizer, kind):
    lora = LoraConfig(r=2, target_modules=["up_proj"])
    adapters = {
        "trained base": None,
        "retain adapter": {"retain": lora, "forget": LoraConfig(r=3, target_modules=["q_proj"])},
        "two regions": {
            "forget": RoutedConfig(size=3, task_type="CAUSAL_LM"),
            "bio": RoutedConfig(size=2, task_type="CAUSAL_LM"),
        },
    }[kind]
    options = dict(save_strategy="steps", save_steps=3, seed=4)
    if kind == "retain adapter":
        options |= dict(train_base=False, base_adapters=["retain"])
    whole = train(tmp_path / "whole", tokenizer, model_of(adapters=adapters), **options)
    resumed = train(
        tmp_path / "resumed",
        tokenizer,
        model_of(adapters=adapters),
        resume=str(tmp_path / "whole" / "checkpoint-3"),
        **options,
    )
    assert_same(weights(whole.model), weights(resumed.model))
    assert whole.tokens_per_route == resumed.tokens_per_route and sum(whole.tokens_per_route.values()) > 0
    assert [h["loss"] for h in whole.state.log_history if "loss" in h][3:] == [
        h["loss"] for h in resumed.state.log_history if "loss" in h
    ][3:]


def test_best_model_with_two_regions_and_a_trained_base(tmp_path, tokenizer):
    adapters = {"forget": RoutedConfig(size=3, task_type="CAUSAL_LM"), "bio": LoraConfig(r=2)}
    adapters["bio"] = RoutedConfig(size=2, task_type="CAUSAL_LM")
    trainer = RoutedTrainer(
        model_of(adapters=adapters),
        arguments(
            tmp_path, learning_rate=0.5, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True, metric_for_best_model="eval_ablated_loss", greater_is_better=False, max_steps=4,
        ),
        routes=presets.sgtm("forget"), train_dataset=rows(), eval_dataset=rows(5).remove_columns("route_label"),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [h["eval_ablated_loss"] for h in trainer.state.log_history if "eval_ablated_loss" in h]
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_ablated_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert {"test_loss", "test_ablated_loss"} <= set(trainer.evaluate(metric_key_prefix="test"))


def test_saved_run_loads_bit_equal(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer)
    trainer.save_model()
    ids = torch.arange(3, 13).reshape(2, 5)
    trainer.routing.detach()
    model = trainer.model.eval()
    with torch.no_grad():
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        assert torch.equal(load_routed(tmp_path, regions=["forget"])(input_ids=ids).logits, on)
        assert torch.equal(load_routed(tmp_path)(input_ids=ids).logits, off)
    saved = json.loads((tmp_path / "routing.json").read_text())
    assert saved["tokens_per_route"] == dict(trainer.tokens_per_route)
    assert not list(tmp_path.glob("**/*.bin"))


def test_continuing_from_load_routed(tmp_path, tokenizer):
    train(tmp_path / "a", tokenizer).save_model()
    model = load_routed(tmp_path / "a", regions=["forget"], is_trainable=True)
    before = weights(model)
    trainer = train(tmp_path / "b", tokenizer, model)
    after = weights(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in before if "q_proj" in name or ".forget." in name)
