from __future__ import annotations

import copy

import pytest
import torch
from families import tiny
from torch import nn
from transformers import PreTrainedModel
from unlearning_parts import FORGET, RETAIN, arguments, learned_model

from routed_peft.unlearning import UnlearningTrainer, unlearn

OPTIONS = {"learning_rate": 1e-2, "alpha": 10.0, "max_steps": 30}


@pytest.fixture(scope="module")
def learned() -> PreTrainedModel:
    return learned_model()


def hooks(model: nn.Module) -> dict[str, int]:
    return {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}


@pytest.mark.slow
def test_rmu_steers_to_one_fixed_direction_and_keeps_its_retain_term(learned, tmp_path):
    """The faults of the reference implementations, each one looked at."""
    model = copy.deepcopy(learned)
    args = arguments(tmp_path, "rmu", **OPTIONS)
    trainer = UnlearningTrainer(model, args, forget_rows=FORGET, retain_rows=RETAIN)
    target = trainer._target.clone()
    assert 0.2 < target.lt(0).float().mean() < 0.8, "not the positive orthant"
    lengths = trainer.reference(torch.tensor([row["input_ids"] for row in FORGET]), output_hidden_states=True)
    typical = lengths.hidden_states[trainer._layer + 1][:, :-1].norm(dim=-1).flatten().median()
    assert target.norm().item() == pytest.approx(5 * typical.item(), rel=0.05)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    before = trainer._before(batch)["retain"].activations()
    trainer.train()
    assert torch.equal(trainer._target, target), "the same direction in every step"
    assert torch.equal(trainer._before(batch)["retain"].activations(), before), "the reference is frozen"
    assert hooks(model) == hooks(trainer.reference), (
        "transformers has put its own in place at the first forward pass; no more"
    )
    strayed = {}
    for alpha in (0.0, 10.0):
        moved = copy.deepcopy(learned)
        args = arguments(tmp_path, "rmu", **{**OPTIONS, "alpha": alpha})
        UnlearningTrainer(moved, args, forget_rows=FORGET, retain_rows=RETAIN).train()
        now = trainer._run(moved.eval(), batch).select(~batch["is_forget"]).activations()
        strayed[alpha] = (now - before).norm().item()
    assert strayed[10.0] < 0.5 * strayed[0.0], "the retain term works"


def test_rmu_trains_a_few_output_projections_and_thaws_the_rest(learned, tmp_path):
    model = copy.deepcopy(learned)
    unlearn(
        model,
        FORGET,
        retain_rows=RETAIN,
        args=arguments(tmp_path, "rmu", max_steps=2, rmu_layer=1, rmu_train_layers=[1]),
    )
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, learned.get_parameter(name))}
    assert moved == {"model.layers.1.mlp.down_proj.weight"}
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "phi3"])
def test_rmu_finds_its_way_in_other_architectures(tmp_path, family):
    model = tiny(family)
    unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "rmu", max_steps=1))


def test_rmu_can_steer_by_an_absolute_length(learned, tmp_path):
    args = arguments(tmp_path, "rmu", steering=6.5, steering_relative=False)
    trainer = UnlearningTrainer(copy.deepcopy(learned), args, forget_rows=FORGET, retain_rows=RETAIN)
    assert trainer._target.norm().item() == pytest.approx(6.5, rel=1e-5)
