from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from peft import LoraConfig
from torch import nn
from training_parts import LABELS, arguments, assert_same, model_of, rows, train, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from routed_peft import GradientRouting, RoutedConfig, RoutedTrainer, load_routed, presets
from routed_peft.data import RoutedCollator, train_tokenizer
from routed_peft.routes import Route
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.training import SelfLabeledRows


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], vocab_size=258)


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


def test_idle_groups_do_not_move(tmp_path, tokenizer):
    """Three steps of all labels give momentum; then only forget rows come, and the base must stand still."""
    data = rows(12, LABELS).to_list() + rows(12, ["forget"]).to_list()
    options = dict(train_sampling_strategy="sequential", weight_decay=0.1, dataset=Dataset.from_list(data))
    half = weights(train(tmp_path, tokenizer, max_steps=3, lr_scheduler_type="constant", **options).model)
    full = weights(train(tmp_path, tokenizer, max_steps=6, lr_scheduler_type="constant", **options).model)
    moved = {name for name in full if not torch.equal(full[name], half[name])}
    assert moved and all(".forget." in name for name in moved)


def test_region_rate_and_decay(tmp_path, tokenizer):
    trainer = train(
        tmp_path,
        tokenizer,
        max_steps=1,
        region_learning_rate=0.5,
        weight_decay=0.1,
        region_weight_decay=0.3,
        warmup_steps=0,
    )
    groups = {(g["route"], g["weight_decay"]): g["initial_lr"] for g in trainer.optimizer.param_groups}
    assert groups == {("base", 0.1): 1e-2, ("base", 0.0): 1e-2, ("forget", 0.3): 0.5}


def test_clip_per_group_leaves_the_base_alone(tmp_path, tokenizer):
    """With SGD, a huge region gradient shrinks the base's update only where clipping is global."""
    steps = {}
    for per_group in (False, True):
        for boost in (1.0, 100.0):
            routes = {"x": Route(weights={"forget": boost})}
            trainer = train(
                tmp_path, tokenizer, routes=routes, dataset=rows(4, ["x"]), max_steps=1, optim="sgd", max_grad_norm=0.1,
                clip_per_group=per_group,
            )  # fmt: skip
            steps[per_group, boost] = weights(trainer.model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(steps[True, 1.0][name], steps[True, 100.0][name])
    assert not torch.allclose(steps[False, 1.0][name], steps[False, 100.0][name])


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


def test_activation_penalty_is_part_of_the_loss(tmp_path, tokenizer):
    plain = train(tmp_path, tokenizer, max_steps=1, edges="activations", routes=presets.era())
    penal = train(tmp_path, tokenizer, max_steps=1, edges="activations", routes=presets.era(), activation_l1=0.5)
    loss = [t.state.log_history[0]["loss"] for t in (plain, penal)]
    assert loss[1] > loss[0] + 0.01
    accumulated = train(
        tmp_path, tokenizer, max_steps=1, edges="activations", routes=presets.era(), activation_l1=0.5,
        per_device_train_batch_size=1, gradient_accumulation_steps=4, dataset=rows(4, length=6),
        train_sampling_strategy="sequential",
    )  # fmt: skip
    at_once = train(
        tmp_path, tokenizer, max_steps=1, edges="activations", routes=presets.era(), activation_l1=0.5,
        dataset=rows(4, length=6), train_sampling_strategy="sequential",
    )  # fmt: skip
    assert accumulated.state.log_history[0]["loss"] == pytest.approx(at_once.state.log_history[0]["loss"], rel=1e-4)


def two_alphabets(tokens: int = 8) -> Dataset:
    """Forget rows in one alphabet, retain rows in another; a quarter carries no label."""
    letters = {"forget": (3, 9), "retain": (120, 126)}
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(160):
        side = ("forget", "retain")[i % 2]
        ids = torch.randint(*letters[side], (tokens,), generator=generator).tolist()
        data.append({"input_ids": ids, "route_label": "unlabeled" if i >= 120 else side, "side": side})
    return Dataset.from_list(data)


def self_labeled(rows: Dataset | None = None, first_forget_share: float = 0.25, **options) -> SelfLabeledRows:
    """A start of ten steps, too short to learn much from a tenth of its rows."""
    start = {"labeled_first": 0.5, "first_forget_share": first_forget_share}
    return SelfLabeledRows(rows or two_alphabets(), 160, forget_share=0.25, **start, **options)


def swapped(rows: Dataset, numbers: Sequence[int]) -> Dataset:
    """The same rows with wrong labels at some numbers."""
    other = {"forget": "retain", "retain": "forget"}
    return rows.map(
        lambda row, i: {"route_label": other[row["side"]] if i in numbers else row["route_label"]}, with_indices=True
    )


SELF_LABELING = dict(
    train_sampling_strategy="sequential", per_device_train_batch_size=8, max_steps=20, learning_rate=5e-2,
    lr_scheduler_type="constant", self_check=False,
)  # fmt: skip


def test_self_labels_agree_with_the_truth_and_resume(tmp_path, tokenizer):
    """Once the region knows one alphabet, it finds the unlabelled rows written in it."""
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=14)
    data = self_labeled(robust_share=0.2)
    trainer = train(tmp_path / "a", tokenizer, dataset=data, **options)
    assert data.labels.tolist() == data.rows["side"][:]
    assert [(scoring["step"], scoring["start"]) for scoring in data.scorings] == [(10, 11 * 8)]
    taken = trainer.tokens_per_route
    assert taken["unlabeled"] <= 8 * 7 and sum(taken.values()) == 160 * 7
    assert 0.2 < 1 - data.in_order("side")[11 * 8 :].count("retain") / (160 - 11 * 8) < 0.3  # forget_share
    again = self_labeled(robust_share=0.2)
    resumed = train(tmp_path / "b", tokenizer, dataset=again, resume=str(tmp_path / "a" / "checkpoint-14"), **options)
    assert_same(weights(trainer.model), weights(resumed.model))
    assert again.scorings == data.scorings and again.in_order("side") == data.in_order("side")


def test_rows_laid_out_for_another_length_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"laid out for a run of 160 and it takes 80, 10 steps of 8: .*`count=80`"):
        train(tmp_path, tokenizer, dataset=self_labeled(), **SELF_LABELING | {"max_steps": 10})


def test_documents_that_share_a_row_are_told_apart_and_resume(tmp_path, tokenizer):
    """Every unlabelled row has a document in either alphabet, each of four tokens with the one that ends it."""
    separator, rows = 1, two_alphabets().to_list()
    for row in rows:
        row["input_ids"][3] = row["input_ids"][7] = separator
        row["side"] = [row["side"]] * 8
    for one, other in zip(rows[120::2], rows[121::2], strict=True):
        for name in ("input_ids", "side"):
            one[name][4:], other[name][4:] = other[name][4:], one[name][4:]
    rows = Dataset.from_list(rows)
    about = {"labeled_first": 0.5, "forget_share": 0.25, "first_forget_share": 0.25, "separator": separator}
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=14)
    data = SelfLabeledRows(rows, 160, **about)
    trainer = train(tmp_path / "a", tokenizer, dataset=data, **options)
    found = data.rows.select(data.found_rows)
    assert [set(sides) for sides in found["side"]] == [{label} for label in data.labels[data.found_rows]]
    assert len(found) == 40 and data.scorings[0]["is_forget"][0] in ([True, False], [False, True])
    again = SelfLabeledRows(rows, 160, **about)
    resumed = train(tmp_path / "b", tokenizer, dataset=again, resume=str(tmp_path / "a" / "checkpoint-14"), **options)
    assert_same(weights(trainer.model), weights(resumed.model))


def test_the_summary_says_what_a_run_has_cost(tmp_path, tokenizer):
    """Scoring a row takes two forward passes; a run whose tokens are not counted has no ledger."""
    data = self_labeled()
    trainer = train(tmp_path / "a", tokenizer, dataset=data, include_num_input_tokens_seen="all", **SELF_LABELING)
    ledger = TrainingCost.from_dict(trainer.run_summary(labeled_forget_tokens=24)["ledger"])
    size = matmul_parameters(trainer.model)
    scored = 8 * (len(data.scorings[0]["rows"]) + sum(label != "unlabeled" for label in data.rows["route_label"]))
    assert scored == data.scored_tokens and self_labeled().scored_tokens == 0
    assert ledger == TrainingCost(6 * size * 160 * 8 + 2 * size * 2 * scored, 20, 160 * 8, 24)
    trainer.state.num_input_tokens_seen = 0
    assert "ledger" not in trainer.run_summary()


def test_a_region_that_overrules_finds_wrong_labels(tmp_path, tokenizer):
    """Eleven of 120 are wrong, of either side."""
    wrong = range(0, 120, 11)
    data = self_labeled(swapped(two_alphabets(), wrong), overrule=True, first_forget_share=0.5, threshold="median")
    sides = np.array(data.rows["side"][:], dtype=object)
    train(tmp_path, tokenizer, dataset=data, **SELF_LABELING)
    scored = np.array(data.scorings[0]["rows"])
    assert set(wrong) & set(scored.tolist()) and (data.labels[scored] == sides[scored]).all()


def test_a_second_scoring_counts_from_where_it_was_and_resumes(tmp_path, tokenizer):
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=4)
    about = {
        "rows": swapped(two_alphabets(), range(0, 120, 23)),
        "overrule": True,
        "score_again_at": 0.7,
        "threshold": "median",
    }
    data = self_labeled(first_forget_share=0.5, **about)
    trainer = train(tmp_path / "a", tokenizer, dataset=data, **options)
    assert [(scoring["step"], scoring["start"]) for scoring in data.scorings] == [(10, 11 * 8), (14, 15 * 8)]
    logged = [entry for entry in trainer.state.log_history if "self_labels_forget" in entry]
    assert [entry["step"] for entry in logged] == [10, 14]
    asked = sum(len(scoring["rows"]) for scoring in data.scorings)
    assert data.scored_tokens == 8 * (asked + 2 * 120), "those with a label are asked each time"
    scored = np.array(data.scorings[1]["rows"])
    assert (data.labels[scored] == np.array(data.rows["side"][:], dtype=object)[scored]).all()
    for step in (12, 16):  # between the two, and after
        again = self_labeled(first_forget_share=0.5, **about)
        resume = str(tmp_path / "a" / f"checkpoint-{step}")
        resumed = train(tmp_path / f"{step}", tokenizer, dataset=again, resume=resume, **options)
        assert_same(weights(trainer.model), weights(resumed.model))
        assert again.scorings == data.scorings
    before = list(data.scorings)
    afresh = train(tmp_path / "c", tokenizer, dataset=data, **options)
    assert_same(weights(trainer.model), weights(afresh.model))
    assert data.scorings == before, "rows that served before forget what was found"


def test_a_run_that_stops_at_a_scoring_resumes_with_the_same_weights_of_tokens(tmp_path, tokenizer):
    """The rows of the next step, which a loader may have fetched, keep what they counted as."""
    options = SELF_LABELING | dict(save_strategy="steps", save_steps=10, routes=presets.sgtm("forget", 1.0))
    about = {"overrule": True, "first_forget_share": 0.5, "token_weights": torch.linspace(0, 1, 300)}
    about["rows"] = swapped(two_alphabets(), range(1, 120, 3))
    trainer = train(tmp_path / "a", tokenizer, dataset=self_labeled(**about), **options)
    resume = str(tmp_path / "a" / "checkpoint-10")
    resumed = train(tmp_path / "b", tokenizer, dataset=self_labeled(**about), resume=resume, **options)
    assert_same(weights(trainer.model), weights(resumed.model))


def test_self_labels_refuse_what_they_cannot_do(tmp_path, tokenizer):
    for share in (0.51, 0.96):  # the step of the first scoring, and the last but one
        with pytest.raises(ValueError, match="`score_again_at`: after step .* of 20 there is nothing left to label"):
            train(tmp_path / "a", tokenizer, dataset=self_labeled(score_again_at=share), **SELF_LABELING)
    with pytest.raises(ValueError, match="have none"):
        train(tmp_path / "a", tokenizer, dataset=self_labeled(), routes=presets.classic(), **SELF_LABELING)
    with pytest.raises(ValueError, match="`train_sampling_strategy` to 'sequential'"):
        train(tmp_path / "a", tokenizer, dataset=self_labeled())
    with pytest.raises(ValueError, match="cannot tell them apart"):
        data = self_labeled()

        class TurnRound(TrainerCallback):  # the labels, under way
            def on_step_begin(self, args, state, control, **kwargs):
                data._given[:120] = swapped(two_alphabets(), range(120))["route_label"][:120]

        train(tmp_path / "a", tokenizer, dataset=data, callbacks=[TurnRound()], **SELF_LABELING)


def test_quantised_like_frozen_modules_stay_unswapped(tmp_path, tokenizer):
    model = model_of(
        adapters={
            "retain": LoraConfig(r=2, target_modules=["up_proj"]),
            "forget": LoraConfig(r=2, target_modules=["up_proj"]),
        }
    )
    trainer = train(tmp_path, tokenizer, model, train_base=False, base_adapters=["retain"], max_steps=2)
    assert type(trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is nn.Linear


def refused(tmp_path, tokenizer, message: str, dataset=None, **options):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tokenizer, dataset=dataset, **options)


def test_bad_input(tmp_path, tokenizer):
    refused(tmp_path, tokenizer, "no column `route_label`", rows().remove_columns("route_label"))
    refused(
        tmp_path, tokenizer, "null", Dataset.from_list([*rows(4).to_list(), {"input_ids": [3, 4], "route_label": None}])
    )
    refused(tmp_path, tokenizer, "did you mean 'retain'", rows(labels=["retian", "forget"]))
    refused(tmp_path, tokenizer, "no row is routed: only .'unlabeled'. occurs", rows(labels=["unlabeled"]))
    refused(tmp_path, tokenizer, "no row trains the region 'forget'", rows(labels=["retain"]))
    refused(tmp_path, tokenizer, "`use_liger_kernel`", use_liger_kernel=True)
    with pytest.raises(ValueError, match="needs `processing_class`"):
        RoutedTrainer(model_of(), arguments(tmp_path), routes=presets.sgtm())
    short = rows(4).remove_columns("route_label").add_column("route_labels", [["forget"]] * 4)
    refused(tmp_path, tokenizer, "one.*per token", short)


@pytest.mark.parametrize(
    ("attribute", "message"), [("deepspeed", "DeepSpeed keeps"), ("fsdp", "`use_orig_params` or use FSDP2")]
)
def test_sharding_that_hides_gradients_is_refused(tmp_path, tokenizer, monkeypatch, attribute, message):
    build = Trainer.create_accelerator_and_postprocess

    def sharded(trainer):  # what accelerate would have set up; neither runs on a CPU
        build(trainer)
        if attribute == "deepspeed":
            trainer.is_deepspeed_enabled = True
        else:
            plugin = SimpleNamespace(fsdp_version=1, use_orig_params=False)
            monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    refused(tmp_path, tokenizer, message)


@pytest.mark.parametrize(
    ("self_check", "message"),
    [(False, "the loss is nan at step 0"), (True, "self-check: the loss of the first batch is nan")],
)
def test_a_nan_loss_stops_the_run(tmp_path, tokenizer, self_check, message):
    model = model_of()
    model.base_model.model.model.norm.weight.data.fill_(float("nan"))
    refused(tmp_path, tokenizer, message, model=model, self_check=self_check)


def test_a_failing_self_check_stops_the_run(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(
        "routed_peft.functional.PositionWeights.of", classmethod(lambda cls, m, gather=True: cls(m, None, None))
    )
    refused(tmp_path, tokenizer, "must not train 'base'")


def test_own_optimizer_needs_tags(tmp_path, tokenizer):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = RoutedTrainer(
        model, arguments(tmp_path), routes=presets.sgtm(), train_dataset=rows(), processing_class=tokenizer,
        optimizers=(optimizer, None),
    )  # fmt: skip
    with pytest.raises(ValueError, match='needs a "route" key'):
        trainer.train()


def test_routing_is_what_a_trained_model_says(tmp_path, tokenizer):
    trainer = train(tmp_path, tokenizer, max_steps=1)
    assert isinstance(trainer.routing, GradientRouting) and trainer.model._routed_train_base is True


def test_a_batch_without_labels_stops_the_run(tmp_path, tokenizer):
    """The dataset has the column; the collator loses it."""
    trainer = RoutedTrainer(
        model_of(), arguments(tmp_path), routes=presets.sgtm("forget"), data_collator=RoutedCollator(tokenizer, None),
        train_dataset=rows(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="a training batch came without `route_label` or `route_labels`"):
        trainer.train()


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
