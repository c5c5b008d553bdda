"""Evaluation losses as means over tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_parts import rows, trainer_of

from routed_peft.training.token_loss import ignore_repeated_rows


@torch.no_grad()
def token_mean(model, data) -> float:
    """Return the mean over all targets, row by row without padding."""
    sums, count = 0.0, 0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        sums += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return sums / count


@pytest.mark.parametrize("batch_size", [1, 4, 24])
def test_the_loss_does_not_depend_on_how_rows_are_batched(tmp_path, tokenizer, batch_size):
    """Rows of 4 to 8 tokens; seven of them, so that the last batch is short, too."""
    data = rows(7, length=None)
    trainer = trainer_of(tmp_path, tokenizer, per_device_eval_batch_size=batch_size, evaluate_ablated=False)
    found = trainer.evaluate(data)["eval_loss"]
    assert found == pytest.approx(token_mean(trainer.model.eval(), data), rel=1e-5)
    assert trainer.evaluate(data.select([3]), metric_key_prefix="other")["other_loss"] == pytest.approx(
        token_mean(trainer.model.eval(), data.select([3])), rel=1e-5
    )


def test_a_loss_function_of_the_user_is_given_the_tokens_of_its_batch(tmp_path, tokenizer):
    given = []

    def summed(outputs, labels, num_items_in_batch=None, **_):
        given.append(int(num_items_in_batch))
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items_in_batch

    data = rows(7)
    trainer = trainer_of(tmp_path, tokenizer, per_device_eval_batch_size=4, evaluate_ablated=False)
    plain = trainer.evaluate(data)["eval_loss"]
    trainer.compute_loss_func = summed
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(plain, rel=1e-5)
    lengths = [len(row["input_ids"]) - 1 for row in data]
    assert given == [sum(lengths[:4]), sum(lengths[4:])]


def test_options_of_training_are_as_they_were_after_an_evaluation(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, evaluate_ablated=False)
    before = trainer.args.average_tokens_across_devices
    trainer.evaluate(rows(4))
    assert trainer.args.average_tokens_across_devices == before and not trainer._measures
    trainer.compute_loss_func = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(rows(4))
    assert trainer.args.average_tokens_across_devices == before and not trainer._measures


def accelerator(processes: int, rank: int, remainder: int, end: bool = True) -> Any:
    state = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    return SimpleNamespace(num_processes=processes, process_index=rank, gradient_state=state)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        (accelerator(1, 0, 3), 4),  # one process repeats nothing
        (accelerator(2, 0, 5, end=False), 4),  # not the last batch
        (accelerator(2, 0, 0), 4),  # all of the last batch are rows of their own
        (accelerator(2, 0, 5), 4),
        (accelerator(2, 1, 5), 1),
        (accelerator(2, 0, 3), 3),
        (accelerator(2, 1, 3), 0),
        (accelerator(3, 2, 9), 1),
    ],
)
def test_rows_that_fill_up_a_last_batch_have_no_loss(state, kept):
    labels = torch.arange(12).view(4, 3)
    found = ignore_repeated_rows(labels, state)
    assert torch.equal(found[:kept], labels[:kept]) and (found[kept:] == -100).all()
    assert torch.equal(labels, torch.arange(12).view(4, 3)), "the batch itself stays"
