from __future__ import annotations

import pytest
from training_parts import rows, train

from routed_peft import presets


@pytest.mark.slow
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
