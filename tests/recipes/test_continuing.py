"""Pretraining that goes on from a run: what the run remembers is used."""

from __future__ import annotations

import runpy

import pytest
from checkpoint_parts import frozen
from datasets import Dataset
from places import ROOT

from routed_peft import GradientRouting, RoutedTrainingArguments, presets
from routed_peft.data import train_tokenizer


@pytest.mark.parametrize("train_base", [None, False])
def test_a_run_with_a_frozen_base_keeps_its_base_adapters_and_regions(tmp_path, train_base):
    _, run = frozen(tmp_path, kept_regions=["forget"])
    train_tokenizer(["a"], vocab_size=258).save_pretrained(tmp_path / "base")
    pretrain = runpy.run_path(str(ROOT / "recipes/pretrain.py"))
    args = RoutedTrainingArguments(str(tmp_path / "out"), train_base=train_base, report_to="none", use_cpu=True)
    recipe = pretrain["Recipe"](model_name_or_path=str(run))
    model, _ = pretrain["build"](recipe, args, Dataset.from_dict({"text": ["a"]}))
    args.continue_run(model)
    assert args.base_adapters == ["retain"] and args.train_base is False
    assert pretrain["kept_regions"](recipe, args, model) == ["forget"]
    routing = GradientRouting(
        model, presets.sgtm("forget"), train_base=args.train_base, base_adapters=args.base_adapters
    )
    assert routing.groups == ["base", "forget"]
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
