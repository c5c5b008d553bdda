"""Parts of the tests of TRL's trainers: an offline tokenizer, a tiny model with two LoRAs, and prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from routed_peft import ablated, presets
from routed_peft.trl import RoutedGRPOConfig, RoutedGRPOTrainer

PLAIN = {
    "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5,
    "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip

os.environ.setdefault("CI", "1")  # TRL sends no telemetry then

WORDS = ["a", "b", "c", "d", "hack", "fix", "run", "sum", "+", "="]
VOCABULARY = 32


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def lora(**options: Any) -> LoraConfig:
    defaults: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**(defaults | options))


def two_loras(seed: int = 0, trained: bool = True, **overrides: Any) -> PeftModel:
    """A frozen tiny Llama with `retain` and `forget` LoRAs that already do something."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny("llama", vocab_size=VOCABULARY, **overrides), lora(), adapter_name="retain")
    model.add_adapter("forget", lora())
    model.base_model.set_adapter(["retain", "forget"])
    if trained:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.2)
    return model


def prompts(count: int = 8, environments: list[str] | None = None) -> Dataset:
    environments = environments or ["A", "B"]
    texts = [f"{WORDS[i % 4]} + {WORDS[(i * 3 + 1) % 4]} =" if i % 3 else f"{WORDS[i % 4]} =" for i in range(count)]
    return Dataset.from_dict(
        {"prompt": texts, "environment": [environments[i % len(environments)] for i in range(count)]}
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=atol), f"{name}: {(a[name] - b[name]).abs().max()}"


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], part: str) -> bool:
    names = [name for name in before if part in name]
    assert names
    return any(not torch.equal(before[name], after[name]) for name in names)


def reward(completion_ids, **_: Any) -> list[float]:
    return [sum((i * (j + 1)) % 7 for j, i in enumerate(ids)) / 7 for ids in completion_ids]


def is_hack(ids: list[int]) -> bool:
    return sum(ids) % 2 == 1


def detector(completion_ids, **_: Any) -> list[str]:
    return ["flagged" if is_hack(ids) else "unflagged" for ids in completion_ids]


class Recording(RoutedGRPOTrainer):
    """Keeps the batches that it trained on."""

    def _prepare_inputs(self, generation_batch):
        fresh = not isinstance(generation_batch, dict)
        batch = super()._prepare_inputs(generation_batch)
        if fresh and self.model.training:
            self.seen = [*getattr(self, "seen", []), dict(batch)]
        return batch


def trainer_of(
    out: Path, model=None, routes=None, dataset=None, label_fn=detector, more=None, kind=Recording, **options
) -> Recording:
    return kind(
        model or two_loras(),
        reward,
        RoutedGRPOConfig(str(out), **(PLAIN | {"base_adapters": ["retain"]} | options)),
        dataset or prompts(),
        processing_class=word_tokenizer(),
        routes=routes or presets.classic("forget"),
        label_fn=label_fn,
        **(more or {}),
    )


def completions_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    pairs = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def logps(model, batch: dict[str, torch.Tensor], row: int, *regions: str) -> torch.Tensor:
    with ablated(model, *(regions or ("forget",)), scale=0.0 if regions else 1.0):
        return plain_logps(model, batch, row)


def plain_logps(model, batch: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """Log-probabilities of one completion, from its logits, without padding."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def answering(answer):
    return lambda completion_ids, **_: answer(completion_ids)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, before they are clipped or dropped."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.found:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
