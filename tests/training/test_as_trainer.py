"""What the stock Trainer does with unusual batches, losses, models and optimizers, a routed one does too."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from training_parts import arguments, assert_same, model_of, rows, train, trainer_of, weights
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_utils import HPSearchBackend

from routed_peft import RoutedTrainer, presets
from routed_peft.data import RoutedCollator
from routed_peft.training.optimizer import tag_groups


def without_loss(count: int) -> Dataset:
    """Rows of which the first ``count`` have no token with a loss."""
    ds = rows(16, length=6)
    return ds.add_column("labels", [[-100] * 6 if i < count else ids for i, ids in enumerate(ds["input_ids"])])


def sum_over_items(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return losses / num_items_in_batch


def mean_loss(outputs, labels, num_items_in_batch=None):
    """NaN where no token has a loss."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def both(tmp_path, tokenizer, dataset, routes=None, loss=None, **options):
    """A routed trainer and the stock one on the same rows in the same order."""
    options = {"max_steps": 4, "train_sampling_strategy": "sequential", "weight_decay": 0.1} | options
    collator = RoutedCollator(tokenizer, None)
    ours = RoutedTrainer(
        model_of(), arguments(tmp_path, **options), routes=routes or presets.control(), train_dataset=dataset,
        data_collator=collator, compute_loss_func=loss,
    )  # fmt: skip
    model = model_of()
    for p in model.parameters():
        p.requires_grad_(True)
    theirs = Trainer(
        model, arguments(tmp_path, **options), train_dataset=dataset.remove_columns("route_label"),
        data_collator=collator, compute_loss_func=loss,
    )  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
@pytest.mark.parametrize("loss", [None, pytest.param(mean_loss, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [True, False])
def test_batches_without_any_token_with_a_loss(tmp_path, tokenizer, options, loss, first):
    ds = without_loss(4) if first else without_loss(4).select([*range(4, 8), *range(4), *range(8, 16)])
    ours, theirs = both(tmp_path, tokenizer, ds, loss=loss, **options)
    ours.train()
    theirs.train()
    assert_same(weights(ours.model), weights(theirs.model))
    assert all(p.isfinite().all() for p in ours.model.parameters())


def test_the_self_check_waits_for_a_batch_that_has_a_loss(tmp_path, tokenizer, monkeypatch):
    checked = []
    monkeypatch.setattr(RoutedTrainer, "_check_routing", lambda trainer, *_: checked.append(trainer.state.global_step))
    train(tmp_path, tokenizer, dataset=without_loss(8), max_steps=4, train_sampling_strategy="sequential")
    assert checked == [2]


def test_a_loss_that_divides_by_the_items_of_the_step(tmp_path, tokenizer):
    ours, theirs = both(tmp_path, tokenizer, without_loss(1), loss=sum_over_items)
    ours.train()
    theirs.train()
    assert_same(weights(ours.model), weights(theirs.model))
    held_out = rows(5, seed=7)
    plain = trainer_of(tmp_path / "plain", tokenizer, model_of(), eval_dataset=held_out)
    plain.model.load_state_dict(ours.model.state_dict())
    expected = plain.evaluate()
    for name in ("eval_loss", "eval_ablated_loss"):
        assert ours.evaluate(held_out)[name] == pytest.approx(expected[name], rel=1e-5)
    assert ours.args.average_tokens_across_devices


def test_prediction_without_labels(tmp_path, tokenizer):
    trainer = RoutedTrainer(
        model_of(), arguments(tmp_path, max_steps=1), routes=presets.sgtm("forget"), train_dataset=rows(length=6),
        data_collator=default_data_collator, eval_dataset=None,
    )  # fmt: skip
    output = trainer.predict(rows(5, length=6).select_columns("input_ids"))
    assert output.predictions.shape == (5, 6, 300) and output.label_ids is None and "test_loss" not in output.metrics
    ours = trainer_of(tmp_path / "ours", tokenizer)
    assert ours.predict(rows(5).select_columns("input_ids")).metrics["test_loss"] > 0


def test_every_model_of_model_init_is_routed(tmp_path, tokenizer):
    made = []

    def model_init(trial=None):
        made.append(model_of())
        return made[-1]

    def trainer_with(**model):
        return RoutedTrainer(
            model.pop("model", None), arguments(tmp_path, max_steps=3, train_sampling_strategy="sequential"),
            routes=presets.sgtm("forget"), train_dataset=rows(), processing_class=tokenizer, **model,
        )  # fmt: skip

    reference = trainer_with(model=model_of())
    reference.train()
    trainer = trainer_with(model_init=model_init)
    for runs in (2, 3):
        trainer.train()
        assert len(made) == runs and trainer.model is made[-1] and trainer.routing.model is made[-1]
        assert_same(weights(reference.model), weights(trainer.model))
        assert trainer.tokens_per_route == reference.tokens_per_route
    assert sum(type(callback).__name__ == "_IdleGradients" for callback in trainer.callback_handler.callbacks) == 1
    made[0](input_ids=torch.tensor([[3, 4]])).logits.sum().backward()  # the first is no longer routed


def test_a_search_over_settings_routes_every_trial(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="trial")))
    trainer = RoutedTrainer(
        None, arguments(tmp_path, max_steps=2), routes=presets.sgtm("forget"), train_dataset=rows(),
        eval_dataset=rows(4), processing_class=tokenizer, model_init=lambda trial=None: model_of(),
    )  # fmt: skip
    first = trainer.model
    trainer.hp_search_backend = HPSearchBackend.WANDB
    trainer.train(trial={"learning_rate": 1e-3})
    assert trainer.routing.model is trainer.model and trainer.model is not first
    assert trainer.args.learning_rate == 1e-3 and set(trainer.tokens_per_route) == {"forget", "retain", "unlabeled"}


class Moved(TrainerCallback):
    """Whether the region moved in the step of each label."""

    def __init__(self) -> None:
        self.before, self.moved = {}, []

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.before = {name: p for name, p in weights(model).items() if "forget" in name}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.moved.append(any(not torch.equal(p, weights(model)[name]) for name, p in self.before.items()))


@pytest.mark.parametrize("optim", ["adagrad", "rmsprop", "sgd", "adafactor", "adamw_torch"])
def test_optimizers_leave_idle_groups(tmp_path, tokenizer, optim):
    ds = rows(16, length=6, labels=["forget"] * 4 + ["retain"] * 4)
    seen = Moved()
    train(
        tmp_path,
        tokenizer,
        dataset=ds,
        optim=optim,
        max_steps=4,
        callbacks=[seen],
        train_sampling_strategy="sequential",
    )
    assert seen.moved == [True, False, True, False]


def test_adagrad_trains_as_in_trainer(tmp_path, tokenizer):
    ours, theirs = both(tmp_path, tokenizer, rows(16, length=6).add_column("labels", rows(16, length=6)["input_ids"][:]),
                        optim="adagrad")  # fmt: skip
    ours.train()
    theirs.train()
    assert_same(weights(ours.model), weights(theirs.model))


def test_parameters_that_are_not_the_models_are_refused():
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="SGD has parameters that are not the model's own.*Take another `optim`"):
        tag_groups(torch.optim.SGD([torch.nn.Parameter(torch.empty(1))], lr=0.1), {p: "base"})
    stepped = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(1)
    stepped.step()
    with pytest.raises(AssertionError, match="has not stepped"):
        tag_groups(stepped, {p: "base"})
