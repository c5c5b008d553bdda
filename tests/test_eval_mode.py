from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_parts import TEXTS, byte_tokenizer
from families import tiny
from torch import nn
from unlearning_parts import FORGET

from experiments.common.coherence import restore_coherence
from routed_peft.eval_mode import evaluating
from routed_peft.evaluation.text_loss import TextLoss, check_causal
from routed_peft.subspaces.activations import response_means, writer_gradients
from routed_peft.unlearning import TeacherCache
from routed_peft.unlearning.token_trainer import mean_loss


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, True, False]
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with evaluating(model):
                assert not any(module.training for module in model.modules())
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert [module.training for module in model.modules()] == before


def test_blocks_nest_and_errors_pass_through():
    model = nn.Dropout()
    with evaluating(model):
        with evaluating(model):
            pass
        assert not model.training
    assert model.training
    with pytest.raises(ValueError, match="mine"), evaluating(model):
        raise ValueError("mine")


ROWS, TALK = FORGET[:4], {"conversations": [("a", "cell")]}
MEASURES: dict[str, Callable[[Any, Path], object]] = {
    "TextLoss": lambda model, out: TextLoss(model, byte_tokenizer(), TEXTS)(model),
    "check_causal": lambda model, out: check_causal(model),
    "mean_loss": lambda model, out: mean_loss(model, ROWS),
    "TeacherCache": lambda model, out: TeacherCache.make(out, model, rows=ROWS, k=3),
    "restore_coherence": lambda model, out: restore_coherence(
        model, torch.tensor([row["input_ids"] for row in ROWS]), steps=1, learning_rates=[1e-3]
    ),
    "response_means": lambda model, out: response_means(model, byte_tokenizer(), layers=[0], **TALK),
    "writer_gradients": lambda model, out: list(writer_gradients(model, byte_tokenizer(), **TALK)),
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_measures_a_model_in_training_drops_nothing_out_and_gives_its_mode_back(tmp_path, name):
    model = tiny("llama", vocab_size=300, attention_dropout=0.5).train()
    model.lm_head.eval()
    modes, seen = [module.training for module in model.modules()], []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    MEASURES[name](model, tmp_path)
    assert seen and not any(seen)
    assert [module.training for module in model.modules()] == modes
