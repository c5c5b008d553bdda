"""Additions from outside the package: each is one file and one registration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import relearning_parts
import unlearning_parts
from torch import Tensor, nn
from transformers import HfArgumentParser, PreTrainedModel

from routed_peft.evaluation.relearning import (
    Attack,
    AttackMethod,
    RelearnOptions,
    log_spaced,
    register_attack,
    relearn,
    summarize,
)
from routed_peft.evaluation.relearning.attacks import DATA, METHODS
from routed_peft.unlearning import ForgetLoss, Outputs, UnlearningArguments, register_forget_loss, unlearn
from routed_peft.unlearning.forget_losses import FORGET_LOSSES


def log_likelihood_below(outputs: Outputs, reference: Outputs | None, args: UnlearningArguments) -> Tensor:
    """A toy forget loss: lower the likelihood of each row, until it is `margin` below that of the original."""
    assert reference is not None
    return (outputs.log_probs() - reference.log_probs() + args.margin).clamp(min=0)


@pytest.fixture
def forget_loss():
    register_forget_loss("toy", ForgetLoss(log_likelihood_below, unit="rows", reads_reference=True))
    yield "toy"
    del FORGET_LOSSES["toy"]


@pytest.mark.slow
def test_a_forget_loss_from_outside(tmp_path, forget_loss):
    (args,) = HfArgumentParser(UnlearningArguments).parse_args_into_dataclasses(  # type: ignore[arg-type]
        ["--output_dir", str(tmp_path), "--method", forget_loss, "--use_cpu", "--report_to", "none"]
    )
    assert args.method == "toy" and args.reads_reference == ("forget",) and args.uses_retain
    model = unlearning_parts.learned_model()
    before = [unlearning_parts.loss(model, rows) for rows in (unlearning_parts.FORGET, unlearning_parts.RETAIN)]
    args = unlearning_parts.arguments(tmp_path, forget_loss, margin=20.0)
    _, ledger = unlearn(model, unlearning_parts.FORGET, retain_rows=unlearning_parts.RETAIN, args=args)
    after = [unlearning_parts.loss(model, rows) for rows in (unlearning_parts.FORGET, unlearning_parts.RETAIN)]
    assert after[0] > before[0] + 0.5 and after[1] < before[1] + 0.1 and ledger.serial_steps == 12


def test_a_forget_loss_needs_a_name_of_its_own_and_a_known_unit(forget_loss):
    with pytest.raises(ValueError, match="the forget loss 'toy' exists already"):
        register_forget_loss("toy", log_likelihood_below)
    with pytest.raises(ValueError, match="`unit` of a forget loss must be 'tokens' or 'rows', got 'layers'"):
        register_forget_loss("other", ForgetLoss(log_likelihood_below, unit="layers"))  # type: ignore[arg-type]


@contextlib.contextmanager
def norms(model: PreTrainedModel, attack: Attack) -> Iterator[list[nn.Parameter]]:
    """A toy method of attack: train the norms alone."""
    trained = [parameter.requires_grad_(True) for name, parameter in model.named_parameters() if "norm" in name]
    yield trained


@pytest.fixture
def attack_parts():
    register_attack("norms", method=AttackMethod(norms, (1e-2, 1e-1)))
    register_attack("forget-unrelated", texts=["forget_train", "unrelated_train"])
    yield
    del METHODS["norms"], DATA["forget-unrelated"]


def test_an_attack_from_outside(attack_parts):
    attack = Attack.parse("norms+forget-unrelated+few-shot-2+perturb")
    assert (attack.method, attack.data, attack.documents, attack.perturb) == ("norms", "forget-unrelated", 2, 0.05)
    model = relearning_parts.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data, options = relearning_parts.DATA, RelearnOptions(extensions=0)
    attack = Attack.parse("norms+forget-unrelated")
    curves = relearn(
        model, relearning_parts.tokenizer(), attack=attack, data=data, seeds=[0], steps=log_spaced(5), options=options
    )
    assert [curve.learning_rate for curve in curves] == [1e-2, 1e-1]
    assert summarize(attack, curves)["verdict"] == "attack"
    assert all(bool((tensor == before[name]).all()) for name, tensor in model.state_dict().items())
    assert data.relevant_to(attack).keys() == {"forget_test", "retain_test", "forget_train", "unrelated_train"}


def test_a_part_of_an_attack_needs_a_name_of_its_own(attack_parts):
    for name in ("norms", "lora", "mixed", "few-shot-3", "int8", "perturb", "a+b"):
        with pytest.raises(ValueError, match="has a meaning in names of attacks already"):
            register_attack(name, texts=["forget_train"])
    with pytest.raises(ValueError, match=r"`texts` must be some of forget_train, .*, got \['forget_test'\]"):
        register_attack("new", texts=["forget_test"])
    with pytest.raises(ValueError, match="give one of `method` and `texts`"):
        register_attack("new")
