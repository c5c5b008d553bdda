"""Worker of `test_trl_distributed.py`, run in two processes: GRPO steps whose groups span both."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from trl_parts import Recording, completions_of, trainer_of, weights

from routed_peft import presets


def prompts_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]


class Truncated(Recording):
    """In its first batch, process 1 has nothing to train on: what `mask_truncated_completions` does to long rollouts."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not hasattr(self, "seen") and self.accelerator.process_index == 1:
            batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        return batch


def truncated(out: Path) -> None:
    trainer = trainer_of(
        out / "truncated", kind=Truncated, routes=presets.exclusive("forget"), per_device_train_batch_size=4,
        num_generations=8, max_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer._checked, "the self-check was put off and not made up for"
    parts = {name: p for name, p in weights(trainer.model).items() if "lora" in name}
    torch.save(parts, out / f"truncated-{trainer.accelerator.process_index}.pt")


def main(out: Path) -> None:
    trainer = trainer_of(
        out / "run", routes=presets.exclusive("forget"), per_device_train_batch_size=4, num_generations=8, max_steps=4,
        anchor_share=0.5, anchor_environments=["A", "B"], baseline_over="unflagged", scale_rewards="none", beta=0.1,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    trainer.train()
    rank = trainer.accelerator.process_index
    torch.save(
        {
            "steps": [
                {
                    "completions": completions_of(batch),
                    "prompts": prompts_of(batch),
                    "labels": batch["route_label"],
                    "advantages": batch["advantages"],
                }
                for batch in trainer.seen
            ],
            "weights": {name: p for name, p in weights(trainer.model).items() if "lora" in name},
            "tokens": dict(trainer.tokens_per_route),
        },
        out / f"rank-{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    truncated(Path(sys.argv[1]))
