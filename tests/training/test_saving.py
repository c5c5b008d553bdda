from __future__ import annotations

import json
import shutil

import pytest
import torch
from crashes import every_kill
from peft import LoraConfig
from safetensors.torch import load_file
from training_parts import arguments, assert_same, model_of, rows, train, trainer_of, weights

from routed_peft import Route, RoutedConfig, RoutedTrainer, load_routed, presets
from routed_peft.checkpoint import inspect_checkpoint
from routed_peft.runs.resuming import latest_resumable

BOTH = {**presets.sgtm("forget"), "unlabeled": Route(weights={"bio": 1.0})}


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
    if kind == "two regions":
        options |= dict(routes=BOTH)
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
        routes=BOTH, train_dataset=rows(), eval_dataset=rows(5).remove_columns("route_label"),
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


@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_run_that_is_killed_anywhere_goes_on_to_the_same_model(stride, tmp_path, tokenizer):
    options = dict(save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=2, logging_strategy="no")
    run = tmp_path / "run"

    def work(place):
        def train_and_save():
            trainer = trainer_of(place, tokenizer, **options)
            trainer.train(resume_from_checkpoint=latest_resumable(place))
            trainer.save_model()

        return train_and_save

    work(tmp_path / "whole")()
    expected = load_file(tmp_path / "whole/model.safetensors") | load_file(
        tmp_path / "whole/forget/adapter_model.safetensors"
    )

    def prepare():
        shutil.rmtree(run, ignore_errors=True)
        return work(run)

    for again in every_kill(prepare, stride):
        again()
        assert_same(
            load_file(run / "model.safetensors") | load_file(run / "forget/adapter_model.safetensors"), expected
        )
        assert inspect_checkpoint(run)["problems"] == []
        assert not [left for left in run.rglob(".routed_peft-*") if left.is_dir()]


@pytest.mark.parametrize(
    ("adapters", "options", "spoil", "message"),
    [
        (None, {}, lambda out, model: (out / "model.safetensors").write_text("mine"), "did not write"),
        (None, {}, lambda out, model: (out / "forget").mkdir(), "did not write"),
        (None, {}, lambda out, model: model.generation_config.update(temperature=0.5, do_sample=False), "temperature"),
        (None, {"kept_regions": ["bio"]}, None, "`kept_regions` names 'bio'"),
        (
            None,
            {"save_strategy": "steps"},
            lambda out, model: (
                (out / "checkpoint-5").mkdir(),
                (out / "checkpoint-5/model.safetensors").write_text(""),
            ),
            "did not write",
        ),
        (
            {"default": LoraConfig(r=2), "forget": LoraConfig(r=2)},
            {"train_base": False, "base_adapters": ["default"]},
            None,
            "cannot be called 'default'",
        ),
        ({"x" * 242: LoraConfig(r=2)}, {}, None, "cannot be called 'xxx"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(adapters, options, spoil, message, tmp_path, tokenizer):
    model = model_of(adapters=adapters)
    routes = presets.sgtm(next(reversed(adapters or {"forget": None})))
    with pytest.raises(ValueError, match=message):
        trainer = trainer_of(tmp_path, tokenizer, model, routes=routes, **options)
        if spoil:
            spoil(tmp_path, model)
        trainer.train()
    assert not any(p.grad is not None for p in model.parameters())


def test_an_output_directory_under_a_file_is_refused_before_the_first_step(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path / "out", tokenizer)
    (tmp_path / "file").touch()
    trainer.args.output_dir = str(tmp_path / "file/out")
    with pytest.raises(OSError, match="Not a directory"):
        trainer.train()
    assert trainer.state.global_step == 0
