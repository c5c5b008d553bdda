from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from training_parts import arguments, model_of, rows, train
from transformers import Trainer

from routed_peft import RoutedTrainer, presets


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
        "routed_peft.functional.PositionWeights.from_weights",
        classmethod(lambda cls, m, gather=True: cls(m, None, None)),
    )
    refused(tmp_path, tokenizer, "must not train 'base'")
