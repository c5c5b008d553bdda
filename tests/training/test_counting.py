"""Positions that teach: those from which a loss depends, with a weight other than zero."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from training_parts import arguments, assert_same, model_of, rows, trainer_of, weights

from routed_peft import Route, RoutedTrainer, presets
from routed_peft.data import RoutedCollator
from routed_peft.routing.gradient_routing import GradientRouting


@pytest.fixture(scope="module")
def routing():
    return GradientRouting(model_of(), presets.sgtm("forget"), train_base=True)


def labeled(tokens: list[str], losses: list[bool]) -> Dataset:
    """One kind of row with a label per token, and a loss at some of them."""
    ids = list(range(5, 5 + len(tokens)))
    labels = [token if has else -100 for token, has in zip(ids, losses, strict=True)]
    return Dataset.from_dict({"input_ids": [ids] * 4, "route_labels": [tokens] * 4, "labels": [labels] * 4})


def test_positions_that_only_a_later_loss_reaches_teach(tmp_path, tokenizer):
    """The label of the first tokens trains the region, and the one loss comes after them, under a label that does not."""
    ds = labeled(["forget", "forget", "forget", "retain", "retain"], [False, False, False, False, True])
    routes = {"forget": Route({"base": 0}), "retain": Route({"forget": 0})}
    trainer = trainer_of(tmp_path, tokenizer, routes=routes, dataset=ds, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    moved = {group: any(not torch.equal(before[name], p) for name, p in weights(trainer.model).items()
                        if ("forget" in name) == (group == "forget")) for group in ("base", "forget")}  # fmt: skip
    assert moved == {"base": True, "forget": True}
    assert trainer.tokens_per_route == {"forget": 0, "retain": 4}  # of tokens with a loss


def test_positions_behind_the_last_loss_do_not_teach(tmp_path, tokenizer):
    ds = labeled(["retain", "retain", "retain", "forget", "forget"], [False, True, True, False, False])
    routes = {"forget": Route({"base": 0}), "retain": Route({"forget": 0})}
    trainer = trainer_of(tmp_path, tokenizer, routes=routes, dataset=ds, max_steps=1, self_check=False)
    counted = []
    trainer._check_labels_occur = lambda *_, **__: None
    trainer._count = lambda *args: (RoutedTrainer._count(trainer, *args), counted.append(dict(trainer._taught)))[0]
    trainer.train()
    assert counted[0]["group", "forget"] == 0 and counted[0]["group", "base"] == 4 * 2


def test_weights_of_rows_and_positions_decide_what_teaches(routing):
    labels, reached = torch.tensor([0, 1]), torch.ones(2, 3, dtype=torch.bool)  # forget, retain
    count = routing.count_learning_positions
    assert count(labels, reached) == {"base": 3, "forget": 3}
    assert count(labels, reached, {"base": torch.tensor([1.0, 0.0])}) == {"base": 0, "forget": 3}
    assert count(labels, reached, {"forget": torch.tensor([0.0, 1.0])}) == {"base": 3, "forget": 0}
    by_position = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert count(labels, reached, {"base": by_position}) == {"base": 1, "forget": 3}
    reached[1, 1] = False
    assert count(labels, reached, {"base": by_position}) == {"base": 0, "forget": 3}


@pytest.mark.parametrize("weight", [0.0, [0.0] * 5])
def test_a_group_that_weights_keep_from_learning_rests(tmp_path, tokenizer, weight):
    """With momentum, a gradient of zero would still move it."""
    ds = rows(16, length=5, labels=["unlabeled"])
    ds = ds.add_column("route_weights", [{"base": 1.0 if i < 4 else 0.0} for i in range(16)])
    if isinstance(weight, list):
        ds = ds.remove_columns("route_weights")
        ds = ds.add_column("route_weights", [{"base": [1.0 if i < 4 else 0.0] * 5} for i in range(16)])
    ends = []
    for steps in (1, 3):
        trainer = trainer_of(
            tmp_path, tokenizer, routes={"unlabeled": Route()}, dataset=ds, max_steps=steps, lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer.train()
        ends.append({name: p for name, p in weights(trainer.model).items() if "forget" not in name})
    assert_same(*ends)


def test_a_token_has_its_loss_at_the_position_before_it(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer)
    batch = {"labels": torch.tensor([[-100, -100, 7, 8, -100], [5, 6, -100, -100, 9]])}
    assert trainer._has_loss(batch).int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]


def test_tokens_are_counted_under_the_label_of_the_token_predicted(tmp_path, tokenizer):
    """Token labels and a loss on the completion alone: one token of each kind has a loss in every row."""
    ds = labeled(["retain", "retain", "unlabeled", "forget", "retain"], [False, False, True, True, True])
    trainer = trainer_of(tmp_path, tokenizer, dataset=ds, max_steps=2)
    trainer.train()
    assert trainer.tokens_per_route == {"forget": 8, "retain": 8, "unlabeled": 8}
    first = labeled(["forget", "retain", "retain"], [True, True, True])  # nothing predicts the first token
    trainer = trainer_of(tmp_path, tokenizer, dataset=first, max_steps=1, self_check=False)
    trainer._check_labels_occur = lambda *_, **__: None
    trainer.train()
    assert trainer.tokens_per_route == {"forget": 0, "retain": 8, "unlabeled": 0}


def test_layers_that_are_not_routed_learn_from_all_data_and_so_do_embeddings_head_and_norm():
    model = model_of(tie_word_embeddings=False)
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True, layers=[0])
    names = {id(p): name for name, p in model.named_parameters()}
    base, joint = ({names[id(p)] for p in routing.parameters(group)} for group in ("base", "joint"))
    assert base and all(".layers.0." in name for name in base)
    assert any(".layers.1." in name for name in joint)
    for part in ("embed_tokens", "lm_head", "model.model.norm"):
        assert any(part in name for name in joint), part
    ids = torch.arange(5, 13).reshape(2, 4)
    with routing(["forget", "forget"]):
        model(input_ids=ids, labels=ids).loss.backward()
    assert not any(p.grad.any() for p in routing.parameters("base"))
    assert all(p.grad.any() for p in routing.parameters("joint"))


def test_decay_of_regions_leaves_out_what_the_stock_optimizer_leaves_out(tmp_path, tokenizer):
    """Biases (and norms) of regions have no decay, whatever `region_weight_decay` says."""
    region = LoraConfig(target_modules=["up_proj"], lora_bias=True, task_type="CAUSAL_LM")
    model = model_of(adapters={"forget": region}, mlp_bias=True)
    trainer = RoutedTrainer(
        model, arguments(tmp_path, weight_decay=0.1, region_weight_decay=0.3), routes=presets.sgtm("forget"),
        train_dataset=rows(), data_collator=RoutedCollator(tokenizer, None),
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    biases = {name: value for name, value in decay.items() if "forget" in name and name.endswith("bias")}
    assert biases and set(biases.values()) == {0.0}
    assert {value for name, value in decay.items() if "forget" in name and not name.endswith("bias")} == {0.3}
    assert {value for name, value in decay.items() if "norm" in name} == {0.0}
