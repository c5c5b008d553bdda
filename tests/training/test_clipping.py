"""The norm by which one group is clipped must not carry what another group learned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from training_parts import arguments, assert_same, model_of, rows, train, trainer_of, weights
from transformers import Trainer, TrainerCallback

from routed_peft import Route, presets
from routed_peft.data import RoutedCollator
from routed_peft.losses import DivergedError
from routed_peft.training.optimizer import clips_by_group

OPTIONS = {"max_steps": 3, "max_grad_norm": 0.1, "train_sampling_strategy": "sequential"}


def other_words(ds: Dataset) -> Dataset:
    """The same rows with other tokens where they are labeled forget."""
    change = lambda row: {"input_ids": [3 + (i * 7) % 200 for i in row["input_ids"]]}
    return ds.map(lambda row: change(row) if row["route_label"] == "forget" else {})


def base_of(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: p for name, p in found.items() if "forget" not in name}


def test_words_of_forget_rows_do_not_reach_the_base(tmp_path, tokenizer):
    labels = ["forget", "retain"]
    one, other = (
        weights(train(tmp_path, tokenizer, dataset=ds, **OPTIONS).model)
        for ds in (rows(labels=labels), other_words(rows(labels=labels)))
    )
    assert_same(base_of(one), base_of(other))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_by_one_norm_they_do(tmp_path, tokenizer):
    labels = ["forget", "retain"]
    one, other = (
        weights(train(tmp_path, tokenizer, dataset=ds, clip_per_group=False, optim="sgd", **OPTIONS).model)
        for ds in (rows(labels=labels), other_words(rows(labels=labels)))
    )
    assert any(not torch.equal(one[name], other[name]) for name in base_of(one))


class Spoil(TrainerCallback):
    """Keeps the base as the first step left it."""

    def __init__(self) -> None:
        self.base: dict[str, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.base = self.base or base_of(weights(model))


def test_nan_in_the_gradient_of_a_region_stays_there(tmp_path, tokenizer):
    found = []
    for spoiled in (False, True):
        model, spoil = model_of(), Spoil()
        trainer = trainer_of(tmp_path, tokenizer, model, callbacks=[spoil], self_check=False, **OPTIONS)
        if spoiled:
            trainer.routing.parameters("forget")[0].register_hook(lambda grad: grad * float("nan"))
            with pytest.raises(DivergedError):
                trainer.train()
        else:
            trainer.train()
        found.append(spoil.base)
    assert_same(*found)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_routes_of_ones_are_clipped_as_by_trainer(tmp_path, tokenizer, optim):
    """Bit by bit: by one norm over everything, which is the only reading of the plain Trainer."""
    options = OPTIONS | {"optim": optim}
    ours = train(tmp_path, tokenizer, routes=presets.control(), **options)
    model = model_of()
    for p in model.parameters():
        p.requires_grad_(True)
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=rows().remove_columns("route_label"),
        data_collator=RoutedCollator(tokenizer, None),
    )  # fmt: skip
    trainer.train()
    assert_same(weights(ours.model), weights(model))


def test_the_default_follows_the_routes():
    groups = ["base", "joint", "forget"]
    found = {
        name: clips_by_group(routes, groups, wanted=None)
        for name, routes in {
            "sgtm": presets.sgtm(), "era": presets.era(), "control": presets.control(), "classic": presets.classic("forget"),
            "ablated": {"a": Route(ablated=("forget",))}, "zero": {"a": Route(), "b": Route({"base": 0})},
            "small": {"a": Route({"base": 0.1})},
        }.items()
    }  # fmt: skip
    assert found == {
        "sgtm": True, "era": False, "control": False, "classic": True, "ablated": True, "zero": True, "small": False,
    }  # fmt: skip
    assert clips_by_group(presets.sgtm(), groups, wanted=False) is False
    assert clips_by_group(presets.control(), groups, wanted=True) is True
    assert not clips_by_group({"a": Route({"base": 0})}, ["forget"], wanted=None)  # no base is trained


def test_sharding_that_hides_norms_is_refused(tmp_path, tokenizer, monkeypatch):
    build = Trainer.create_accelerator_and_postprocess

    def sharded(trainer):
        build(trainer)
        plugin = SimpleNamespace(fsdp_version=1, use_orig_params=True)
        monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="FSDP1 hides the norms of single groups"):
        trainer_of(tmp_path, tokenizer, **OPTIONS)
    trainer_of(tmp_path, tokenizer, clip_per_group=False, **OPTIONS)
