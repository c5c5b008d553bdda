from __future__ import annotations

import pytest
from training_parts import rows, trainer_of
from transformers import EarlyStoppingCallback, TrainerCallback

EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Heard(TrainerCallback):
    """Keeps the metrics of every evaluation heard of."""

    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(metrics)


@pytest.mark.parametrize("metric", ["eval_loss", "eval_ablated_loss"])
def test_early_stopping_sees_its_metric_once_per_evaluation(tmp_path, tokenizer, caplog, metric):
    stopping, heard = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0), Heard()
    trainer = trainer_of(
        tmp_path, tokenizer, eval_dataset=rows(5), callbacks=[stopping, heard], load_best_model_at_end=True,
        metric_for_best_model=metric, greater_is_better=False, **EVALUATING,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best; two more are no better by 100 nats
    assert len(heard.metrics) == 3
    assert all({"eval_loss", "eval_ablated_loss"} <= metrics.keys() for metrics in heard.metrics)
    assert "early stopping" not in caplog.text


def test_callbacks_hear_of_every_evaluation_set(tmp_path, tokenizer):
    heard = Heard()
    trainer = trainer_of(
        tmp_path, tokenizer, eval_dataset={"a": rows(3), "b": rows(3)}, callbacks=[heard], disable_tqdm=False
    )
    trainer.evaluate()
    losses = [{key for key in metrics if key.endswith("_loss")} for metrics in heard.metrics]
    assert losses == [{"eval_a_loss", "eval_ablated_a_loss"}, {"eval_b_loss", "eval_ablated_b_loss"}]
    trainer.args.evaluate_ablated = False
    trainer.evaluate(rows(3))
    assert "eval_loss" in heard.metrics[2] and "eval_ablated_loss" not in heard.metrics[2]
