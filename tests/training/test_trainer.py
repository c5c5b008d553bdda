from __future__ import annotations

import os
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from peft import LoraConfig
from torch import nn
from training_parts import arguments, assert_same, model_of, rows, train, weights
from transformers import Trainer, TrainingArguments

from routed_peft import GradientRouting, RoutedTrainer, presets
from routed_peft.adapters import routing_record
from routed_peft.data import RoutedCollator


def test_all_ones_routes_train_bit_identically_to_trainer(tmp_path, tokenizer):
    routed = train(tmp_path / "a", tokenizer, routes=presets.control(), max_grad_norm=1.0, weight_decay=0.1)
    routed.routing.detach()
    model = model_of()
    for p in model.parameters():
        p.requires_grad_(True)
    options = arguments(tmp_path / "b", max_grad_norm=1.0, weight_decay=0.1)
    plain = Trainer(
        model,
        TrainingArguments(**{name: getattr(options, name) for name in PLAIN}),
        train_dataset=rows().remove_columns("route_label"),
        data_collator=RoutedCollator(tokenizer, None),
    )
    plain.train()
    assert_same(weights(routed.model), weights(model))


PLAIN = (
    "output_dir",
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "report_to",
    "use_cpu",
    "save_strategy",
    "disable_tqdm",
    "max_grad_norm",
    "weight_decay",
)


@pytest.mark.slow
def test_checkpointing_on_equals_off(tmp_path, tokenizer):
    runs = [weights(train(tmp_path, tokenizer).model)]
    for reentrant in (False, True):
        model = model_of()
        model.enable_input_require_grads()
        runs.append(
            weights(
                train(
                    tmp_path, tokenizer, model, gradient_checkpointing=True,
                    gradient_checkpointing_kwargs={"use_reentrant": reentrant},
                ).model
            )
        )  # fmt: skip
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_accumulation_of_4_by_2_equals_8(tmp_path, tokenizer):
    model = model_of().double()
    once = train(tmp_path, tokenizer, model, per_device_train_batch_size=8, clip_per_group=True, max_grad_norm=0.5)
    model = model_of().double()
    twice = train(
        tmp_path, tokenizer, model, per_device_train_batch_size=2, gradient_accumulation_steps=4, clip_per_group=True,
        max_grad_norm=0.5,
    )  # fmt: skip
    assert_same(weights(once.model), weights(twice.model), atol=1e-5)
    assert once.tokens_per_route == twice.tokens_per_route


def test_evaluation_is_token_weighted_and_repeated_ablated(tmp_path, tokenizer):
    trainer = RoutedTrainer(
        model_of(), arguments(tmp_path, per_device_eval_batch_size=2), routes=presets.sgtm("forget"), train_dataset=rows(),
        eval_dataset={"forget": rows(5, seed=7), "retain": rows(3, seed=8).remove_columns("route_label")},
        processing_class=tokenizer,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert {
        "eval_forget_loss",
        "eval_retain_loss",
        "eval_ablated_forget_loss",
        "eval_ablated_retain_loss",
    } <= metrics.keys()
    total = tokens = 0
    trainer.model.eval()
    for row in rows(5, seed=7):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), trainer.model.disable_adapter():
            total += float(trainer.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert metrics["eval_ablated_forget_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["eval_ablated_forget_loss"] != metrics["eval_forget_loss"]


@pytest.mark.slow
def test_token_labels_classlabels_and_streams(tmp_path, tokenizer):
    base = rows(12, length=6)
    names = ["retain", "unlabeled", "forget"]  # not the order of the routes
    features = Features({"input_ids": List(Value("int64")), "route_label": ClassLabel(names=names)})
    encoded = Dataset.from_dict(
        base.to_dict() | {"route_label": [names.index(x) for x in base["route_label"]]}, features=features
    )
    tokens = base.remove_columns("route_label").add_column("route_labels", [[x] * 6 for x in base["route_label"]])
    stream = IterableDataset.from_generator(lambda: iter(base.to_list()))
    runs = [
        weights(train(tmp_path, tokenizer, dataset=ds, max_steps=3, train_sampling_strategy="sequential").model)
        for ds in (base, encoded, tokens, stream)
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2], atol=1e-5)  # the same routes as a sum over positions
    assert_same(runs[0], runs[3])


def test_bf16_autocast_trains(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, bf16=True)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


def test_quantised_like_frozen_modules_stay_unswapped(tmp_path, tokenizer):
    model = model_of(
        adapters={
            "retain": LoraConfig(r=2, target_modules=["up_proj"]),
            "forget": LoraConfig(r=2, target_modules=["up_proj"]),
        }
    )
    trainer = train(tmp_path, tokenizer, model, train_base=False, base_adapters=["retain"], max_steps=2)
    assert type(trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is nn.Linear


def test_routing_is_what_a_trained_model_says(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, max_steps=1)
    assert isinstance(trainer.routing, GradientRouting) and routing_record(trainer.model).train_base is True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within Inductor
@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile on a CPU needs a C++ compiler"
)
def test_compiled_equals_eager(tmp_path, tokenizer):
    options = {"dataset": rows(12, length=6), "max_steps": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-5}
    eager = train(tmp_path / "a", tokenizer, model_of(num_hidden_layers=1), gather=False, **options)
    model = model_of(num_hidden_layers=1)
    compiled = train(tmp_path / "b", tokenizer, model, torch_compile=True, self_check=False, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    torch._dynamo.reset()
    assert_same(weights(eager.model), weights(compiled.accelerator.unwrap_model(compiled.model, False)), atol=1e-5)
