"""Adapters of a trainer: what a continued run remembers, and PEFT's verbs in callbacks."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftConfig
from training_parts import arguments, model_of, rows, trainer_of, weights
from transformers import DataCollatorWithPadding, TrainerCallback

from routed_peft import Route, RoutedTrainer, load_routed, presets
from routed_peft.checkpoint.layout import Layout

LORAS: dict[str, PeftConfig] = {
    name: LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM") for name in ("retain", "forget")
}


def test_forgotten_base_adapters_are_refused(tmp_path, tokenizer):
    for train_base in (False, True):
        with pytest.raises(ValueError, match=r"`base_adapters=\['retain'\]`"):
            trainer_of(tmp_path, tokenizer, model_of(adapters=LORAS), base_adapters=[], train_base=train_base)


def test_a_continued_run_keeps_its_base_adapters_and_kept_regions(tmp_path, tokenizer):
    model_of().get_base_model().save_pretrained(tmp_path / "base")
    model = model_of(adapters=LORAS)
    model.get_base_model().config._name_or_path = str(tmp_path / "base")
    first = trainer_of(
        tmp_path / "first", tokenizer, model, train_base=False, base_adapters=["retain"], kept_regions=["forget"]
    )
    first.train()
    first.save_model()
    model = load_routed(tmp_path / "first", ["forget"], is_trainable=True)
    second = trainer_of(tmp_path / "second", tokenizer, model, train_base=None)
    assert second.routing.groups == ["base", "forget"] and second.args.train_base is False
    before = weights(model)
    second.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora" not in n)
    second.save_model()
    layout = Layout.read(tmp_path / "second", "second")
    assert layout.base_adapters == ["retain"] and layout.kept_regions == ["forget"]


def test_a_continued_run_trains_its_base_again(tmp_path, tokenizer):
    first = trainer_of(tmp_path / "first", tokenizer)
    first.save_model()
    model = load_routed(tmp_path / "first", ["forget"], is_trainable=True)
    trainer = trainer_of(tmp_path / "second", tokenizer, model, train_base=None)
    assert trainer.args.train_base is True and trainer.routing.groups == ["base", "forget"]
    trainer.routing.detach()
    fresh = trainer_of(tmp_path / "third", tokenizer, model_of(), train_base=None, routes={"all": Route()},
                       dataset=rows(labels=["all"]))  # fmt: skip
    assert fresh.args.train_base is False and fresh.routing.groups == ["forget"]


class _Verb(TrainerCallback):
    def __init__(self, event: str, verb) -> None:
        setattr(self, event, lambda args, state, control, model=None, **_: verb(model))


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
@pytest.mark.parametrize(
    ("verb", "message"),
    [
        (lambda model: model.base_model.set_adapter("retain"), "are active"),
        (lambda model: model.base_model.disable_adapter_layers(), "switched off"),
        (lambda model: model.merge_adapter(), "merged"),
    ],
)
def test_verbs_of_peft_in_a_callback_are_refused(tmp_path, tokenizer, event, verb, message):
    trainer = trainer_of(tmp_path, tokenizer, model_of(adapters=LORAS), train_base=False, base_adapters=["retain"])
    trainer.add_callback(_Verb(event, verb))  # after the trainer's own
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_end"])
def test_a_merged_mlp_never_reaches_the_optimizer(tmp_path, tokenizer, event):
    """Its weights have grown, and fused AdamW would read beyond its state."""
    trainer = trainer_of(tmp_path, tokenizer, optim="adamw_torch_fused")
    trainer.add_callback(_Verb(event, lambda model: model.merge_adapter()))
    with pytest.raises(ValueError, match=r"merged into .*`unmerge_adapter\(\)`"):
        trainer.train()


def test_rows_of_packed_documents_are_refused_before_training(tmp_path, tokenizer):
    for name in ("seq_lengths", "position_ids"):
        packed = rows(length=4).add_column(name, [[0, 1, 0, 1]] * 24)
        with pytest.raises(ValueError, match=f"the column `{name}`"):
            trainer_of(tmp_path, tokenizer, dataset=packed).train()


def test_another_collator_that_trains_on_padding_is_refused(tmp_path, tokenizer):
    class Careless(DataCollatorWithPadding):
        def __call__(self, features):
            batch = super().__call__(features)
            return {**batch, "labels": batch["input_ids"].clone()}

    trainer = RoutedTrainer(
        model_of(),
        arguments(tmp_path),
        routes=presets.sgtm("forget"),
        train_dataset=rows(),
        data_collator=Careless(tokenizer),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="gives padding a loss"):
        trainer.train()
