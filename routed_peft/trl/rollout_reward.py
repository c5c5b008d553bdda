"""Mean reward of an environment's rollouts under a GRPO trainer's model, for `RegionMonitor`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from routed_peft.data.columns import column_values


class RolloutReward:
    """The mean reward of rollouts of an environment's first prompts, sampled and graded as in training, without anchors.

    Args:
        trainer: gives prompts, generation settings, reward functions and their weights. Generation is by
            `transformers`, even where training samples with vLLM.
        column: column of the prompts' environments.
        count: prompts of each environment in every process, with one rollout each.

    Raises:
        ValueError: where prompts are streamed, or lack the column; when called, for an environment without prompts.

    Example:
        ``RegionMonitor(trainer, MonitorConfig(max_reward_gap=0.3), reward=RolloutReward(trainer, "environment"))``
    """

    def __init__(self, trainer: GRPOTrainer, column: str = "environment", count: int = 16) -> None:
        if not isinstance(trainer.train_dataset, Dataset):
            raise ValueError("`RolloutReward` takes an environment's first prompts, so they cannot be streamed")
        if count < 1:
            raise ValueError(f"`count` must be at least 1, got {count}")
        self.trainer, self.count = trainer, count
        self._environments = column_values(trainer.train_dataset, column)

    @torch.no_grad()
    def __call__(self, model: nn.Module, environment: str) -> float:
        """Return the mean reward of ``model`` in its current state, with its regions or without."""
        trainer = self.trainer
        indices = [i for i, name in enumerate(self._environments) if str(name) == environment][: self.count]
        if not indices:
            known = sorted({str(name) for name in self._environments})
            raise ValueError(f"no prompt is of the environment {environment!r}; there are {known}")
        rows = [cast(Dataset, trainer.train_dataset)[i] for i in indices]
        prompts, tokenizer = [row["prompt"] for row in rows], cast(Any, trainer.processing_class)
        prompt_ids, *_ = trainer._tokenize_prompts(prompts)
        inputs = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(trainer.accelerator.device)
        plain: Any = trainer.accelerator.unwrap_model(model)
        made = plain.generate(**inputs, generation_config=trainer.generation_config)[:, inputs["input_ids"].shape[1] :]
        ids = []
        for row in made.tolist():  # up to and including the end token, as training grades completions
            end = next((i for i, token in enumerate(row) if token in trainer.eos_token_ids), len(row))
            ids.append(row[: end + 1])
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        if is_conversational(rows[0]):
            written = [[{"role": "assistant", "content": text}] for text in written]
        kept = (
            trainer._pending_metrics,
            trainer._pending_extra_logs,
        )  # what reward functions log here is not of training
        trainer._pending_metrics, trainer._pending_extra_logs = defaultdict(list), defaultdict(list)
        try:  # TRL's method, because that of a routed trainer would label these rollouts
            rewards = GRPOTrainer._calculate_rewards(trainer, rows, prompts, written, ids)
        finally:
            trainer._pending_metrics, trainer._pending_extra_logs = kept
        return float((rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1).mean())
