from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from training_parts import LABELS, arguments, model_of, rows, train, weights

from routed_peft import RoutedTrainer, presets
from routed_peft.routes import Route


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


@pytest.mark.slow
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


def test_own_optimizer_needs_tags(tmp_path, tokenizer):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = RoutedTrainer(
        model, arguments(tmp_path), routes=presets.sgtm(), train_dataset=rows(), processing_class=tokenizer,
        optimizers=(optimizer, None),
    )  # fmt: skip
    with pytest.raises(ValueError, match='needs a "route" key'):
        trainer.train()
