"""Labels are found by name whatever collator and dataset a run has."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from families import tiny
from peft import get_peft_model
from torch.utils.data import ConcatDataset, DataLoader, Subset
from training_parts import LABELS, arguments, assert_same, model_of, rows, trainer_of, weights
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, default_data_collator

from routed_peft import RoutedConfig, RoutedTrainer, presets
from routed_peft.data import RoutedCollator

NAMES = ["retain", "unlabeled", "forget"]  # not the order of the routes


class Rows(torch.utils.data.Dataset):
    """A user's own dataset, which knows no features."""

    def __init__(self, dataset: Dataset) -> None:
        self.rows = dataset.to_list()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return dict(self.rows[index])


def data(length: int | None = 6) -> Dataset:
    ds = rows(12, length=length)
    return ds.add_column("labels", ds["input_ids"][:])


def encoded(ds: Dataset) -> Dataset:
    return ds.cast_column("route_label", ClassLabel(names=NAMES))


def bare(ds: Dataset) -> Dataset:
    """Integers whose names are lost."""
    integers = [NAMES.index(label) for label in ds["route_label"]]
    return ds.remove_columns("route_label").add_column("route_label", integers)


def streamed(ds: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(ds.to_list()))


def trained(out, tokenizer, collator, ds, routes=None, model=None, eval_dataset=None, **options) -> RoutedTrainer:
    options = {"max_steps": 3, "train_sampling_strategy": "sequential"} | options
    trainer = RoutedTrainer(
        model or model_of(), arguments(out, **options), routes=routes or presets.sgtm("forget"), data_collator=collator,
        train_dataset=ds, eval_dataset=eval_dataset, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer):
    """Names and our collator: the weights that every other way must give."""
    trainer = trained(tmp_path_factory.mktemp("expected"), tokenizer, None, data())
    assert set(trainer.tokens_per_route) == set(LABELS)
    return weights(trainer.model)


DATASETS = {
    "names": lambda: data(),
    "integers": lambda: encoded(data()),
    "stream of integers": lambda: encoded(data()).to_iterable_dataset(),
    "stream without features": lambda: streamed(data()),
    "torch": lambda: Rows(data()),
    "part": lambda: Subset(encoded(data()), range(12)),
    "parts": lambda: ConcatDataset([encoded(data()).select(range(5)), encoded(data()).select(range(5, 12))]),
    "tensors": lambda: encoded(data()).with_format("torch"),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_any_dataset_and_collator_train_the_same(tmp_path, tokenizer, expected, dataset):
    collator = DataCollatorForSeq2Seq(tokenizer) if dataset not in ("parts", "tensors") else default_data_collator
    trainer = trained(tmp_path, tokenizer, collator, DATASETS[dataset]())
    assert_same(weights(trainer.model), expected)
    assert trainer.data_collator is collator


def test_our_collator_with_the_routes_in_another_order(tmp_path, tokenizer, expected):
    collator = RoutedCollator(tokenizer, dict(reversed(presets.sgtm("forget").items())))
    assert_same(weights(trained(tmp_path, tokenizer, collator, encoded(data())).model), expected)


def test_a_collator_that_gives_no_labels_loses_none(tmp_path, tokenizer, expected):
    assert_same(weights(trained(tmp_path, tokenizer, RoutedCollator(tokenizer, None), data()).model), expected)


def test_names_may_come_with_our_collator(tmp_path, tokenizer, expected):
    collator = RoutedCollator(tokenizer, presets.sgtm("forget"), class_names=NAMES)
    assert_same(weights(trained(tmp_path / "a", tokenizer, collator, bare(data())).model), expected)
    assert_same(weights(trained(tmp_path / "b", tokenizer, collator, streamed(bare(data()))).model), expected)
    with pytest.raises(ValueError, match="leave `class_names` out"):
        trained(tmp_path, tokenizer, RoutedCollator(tokenizer, None, class_names=LABELS), encoded(data()))


def test_workers(tmp_path, tokenizer, expected):
    trainer = trained(tmp_path, tokenizer, DataCollatorForSeq2Seq(tokenizer), encoded(data()), dataloader_num_workers=1)
    assert_same(weights(trainer.model), expected)


@pytest.mark.parametrize("kind", ["stream", "torch", "dataset", "part"])
def test_integers_without_names_are_refused_before_the_first_step(tmp_path, tokenizer, kind):
    ds = bare(data())
    ds = {"stream": streamed(ds), "torch": Rows(ds), "dataset": ds, "part": Subset(ds, range(12))}[kind]
    for collator in (None, DataCollatorForSeq2Seq(tokenizer)):
        model = model_of()
        before = weights(model)
        with pytest.raises(ValueError, match=r"the integer label \d has no name.*cast_column"):
            trained(tmp_path, tokenizer, collator, ds, model=model)
        assert_same(before, weights(model))


def test_parts_with_other_names_have_none(tmp_path, tokenizer):
    other = data().cast_column("route_label", ClassLabel(names=LABELS))
    with pytest.raises(ValueError, match="has no name"):
        trained(tmp_path, tokenizer, None, ConcatDataset([encoded(data()), other]))


def test_token_labels_and_padding(tmp_path, tokenizer):
    ds = data(length=None)
    labels = [[LABELS[(i + j) % 3] for j in range(len(ids))] for i, ids in enumerate(ds["input_ids"])]
    ds = ds.remove_columns("route_label").add_column("route_labels", labels)
    ours = weights(trained(tmp_path / "a", tokenizer, None, ds).model)
    theirs = trained(tmp_path / "b", tokenizer, DataCollatorForSeq2Seq(tokenizer), ds)
    assert_same(ours, weights(theirs.model))


def test_columns_encoded_by_datasets_with_a_region_per_category(tmp_path, tokenizer):
    """`class_encode_column` sorts names, and GRAM's routes are in another order."""
    torch.manual_seed(0)
    region = RoutedConfig(size=4, init="model", task_type="CAUSAL_LM")

    def model():
        torch.manual_seed(0)
        model = get_peft_model(tiny("llama", vocab_size=300), region, "zoo")
        model.add_adapter("bio", region)
        return model

    routes = presets.gram(["zoo", "bio"])
    ds = rows(12, ["core", "zoo", "bio/spread", "bio"], length=6)
    runs = [
        weights(trained(tmp_path / str(i), tokenizer, collator, ds, routes=routes, model=model()).model)
        for i, (collator, ds) in enumerate(
            [
                (None, ds),
                (None, ds.class_encode_column("route_label")),
                (DataCollatorForLanguageModeling(tokenizer, mlm=False), ds.class_encode_column("route_label")),
            ]
        )
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_evaluation_and_prediction_need_no_labels_with_any_collator(tmp_path, tokenizer):
    plain = data().remove_columns("route_label")
    held_out = {"names": data(), "integers": bare(data()), "none": plain, "torch": Rows(bare(data()))}
    trainer = trained(
        tmp_path, tokenizer, DataCollatorForSeq2Seq(tokenizer), encoded(data()), eval_dataset=held_out, max_steps=1
    )
    losses = trainer.evaluate()
    assert len({losses[f"eval_{name}_loss"] for name in held_out}) == 1
    assert trainer.predict(plain).metrics["test_loss"] == pytest.approx(losses["eval_none_loss"])
    trainer.routing.detach()
    ours = trainer_of(tmp_path, tokenizer, trainer.model, dataset=data())
    assert ours.predict(plain).metrics["test_loss"] == pytest.approx(losses["eval_none_loss"])
    assert ours.predict(bare(data())).metrics["test_loss"] == pytest.approx(losses["eval_none_loss"])


class OwnLoader(RoutedTrainer):
    """A trainer whose user makes the loader."""

    collate = staticmethod(default_data_collator)

    def get_train_dataloader(self):
        ds = bare(data()).map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
        return DataLoader(ds, batch_size=4, collate_fn=self.collate)


def test_a_loader_of_ones_own_must_find_labels_by_name(tmp_path, tokenizer, expected):
    def run(collate):
        trainer = OwnLoader(
            model_of(), arguments(tmp_path, max_steps=3), routes=presets.sgtm("forget"), train_dataset=data(),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.collate = collate
        trainer.train()
        return weights(trainer.model)

    with pytest.raises(ValueError, match="the training loader is not the trainer's own"):
        run(default_data_collator)
    reversed_routes = dict(reversed(presets.sgtm("forget").items()))
    with pytest.raises(ValueError, match="the training loader is not the trainer's own"):
        run(RoutedCollator(tokenizer, reversed_routes, class_names=NAMES))
    with pytest.raises(ValueError, match="a training batch came without `route_label`"):
        run(RoutedCollator(tokenizer, None))
    assert_same(run(RoutedCollator(tokenizer, presets.sgtm("forget"), class_names=NAMES)), expected)
