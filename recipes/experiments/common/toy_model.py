"""Small Llamas: made, taught characters from scratch, sampled from, and given two LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from routed_peft.mistakes import check_numbers, option
from routed_peft.routes import IGNORED
from routed_peft.trl import RoutedGRPOConfig

RETAIN = "retain"
"""The adapter that stays."""

MAX_TOKENS = 5
"""Of a completion."""


@dataclass
class ToySettings:
    """Size of the model, how it is taught, and how GRPO trains it.

    >>> ToySettings().hidden_size
    128
    """

    hidden_size: int = option(128, "Width of the model; its MLPs have twice as many units.")
    layers: int = option(3, "Decoder layers.")
    heads: int = option(4, "Attention heads.")
    start_steps: int = option(400, "Supervised steps on demonstrations.")
    start_batch_size: int = option(192, "Demonstrations a step.")
    start_learning_rate: float = option(3e-3, "Peak rate of that; cosine.")
    clean_share: float = option(0.55, "Share of these steps whose answers are right.")
    noise: float = option(0.5, "Share of wrong answers in the steps after that.")
    steps: int = option(200, "Steps of GRPO.")
    prompts: int = option(16, "Prompts a step.")
    generations: int = option(8, "Rollouts of each prompt.")
    learning_rate: float = option(1e-3, "Of both adapters; constant.")
    rank: int = option(8, "Of both LoRA adapters; their scale is 2.")
    evaluate_every: int = option(25, "Steps between evaluations on validation prompts.")
    validation_prompts: int = option(200, "Prompts of each environment in these.")
    test_prompts: int = option(500, "Prompts of each environment in the final numbers.")

    def __post_init__(self) -> None:
        check_size(self)
        check_numbers(self, "start_steps", "start_batch_size", "steps", "prompts", "rank", "evaluate_every", low=1)
        check_numbers(self, "validation_prompts", "test_prompts", low=1)
        check_numbers(self, "generations", low=2)
        check_numbers(self, "start_learning_rate", "learning_rate")
        check_numbers(self, "clean_share", "noise", high=1)

    def start(self) -> dict[str, Any]:
        """Return what the start model depends on."""
        names = (
            "hidden_size layers heads start_steps start_batch_size start_learning_rate clean_share noise test_prompts"
        )
        return {name: getattr(self, name) for name in names.split()}


def check_size(size: ModelSize) -> None:
    """Raise ValueError unless there can be a model of a size.

    >>> check_size(ToySettings(hidden_size=10))
    Traceback (most recent call last):
    ...
    ValueError: `hidden_size` must be even in every head, got 10 for 4 `heads`: make it a multiple of 8
    """
    check_numbers(size, "hidden_size", "layers", "heads", low=1)
    if size.hidden_size % (2 * size.heads):
        raise ValueError(f"`hidden_size` must be even in every head, got {size.hidden_size} for {size.heads} `heads`: make it "
                         f"a multiple of {2 * size.heads}")  # fmt: skip


class ModelSize(Protocol):
    """Settings with the size of a model."""

    hidden_size: int
    layers: int
    heads: int


def make_model(size: ModelSize, tokenizer: PreTrainedTokenizerBase, *, mlp: int = 2, **more: Any) -> LlamaForCausalLM:
    """Return an untrained Llama for the vocabulary of a tokenizer.

    Args:
        size: width, layers and heads.
        tokenizer: with the tokens that open, end and pad a text.
        mlp: units of an MLP over the width of the model.
        more: fields of `LlamaConfig`; by default those of a model of short texts in characters.
    """
    short = {"max_position_embeddings": 32, "tie_word_embeddings": False}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=mlp * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(
            {"initializer_range": size.hidden_size**-0.5} | short | more
        ),  # at the usual 0.02 a narrow model learns slowly
    )
    config._attn_implementation = "eager"  # the fastest for short rows on a CPU
    return LlamaForCausalLM(config)


def open_with_two_loras(start: Path, region: str, *, rank: int, seed: int) -> PeftModel:
    """Return a start model, frozen, with two equal LoRAs on every projection: `RETAIN`, which stays, and the region."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = LlamaForCausalLM.from_pretrained(start, attn_implementation="eager")
    wrapped = get_peft_model(model, lora, adapter_name=RETAIN)
    wrapped.add_adapter(region, lora)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def encode(rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(n, T)`` ids and labels of prompts, all of one length, and answers; prompts have no labels."""
    prompts = [prompt for prompt, _ in rows]
    ids = tokenizer([prompt + answer + tokenizer.eos_token for prompt, answer in rows], padding=True,
                    padding_side="right", return_tensors="pt")["input_ids"]  # fmt: skip
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, IGNORED)
    labels[:, : len(prompts[0])] = IGNORED  # prompts are of equal length
    assert len({len(prompt) for prompt in prompts}) == 1
    return ids, labels


def noise_at(step: int, settings: ToySettings) -> float:
    """Return the share of wrong answers at a step: none at first.

    >>> noise_at(0, ToySettings()), noise_at(399, ToySettings())
    (0.0, 0.5)
    """
    return settings.noise if step >= settings.clean_share * settings.start_steps else 0.0


def teach(
    model: LlamaForCausalLM, settings: ToySettings, draw: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
) -> LlamaForCausalLM:
    """Train all of a model for ``settings.start_steps`` on the ids and labels that ``draw`` returns for a step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.start_learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, settings.start_steps)
    for step in range(settings.start_steps):
        ids, labels = draw(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = MAX_TOKENS,
    forbidden: str = "",
) -> list[str]:
    """Sample a completion of every prompt at temperature 1, in one batch.

    Args:
        model: a transformers model or a PeftModel.
        prompts: as text.
        tokenizer: of the model.
        max_tokens: of a completion.
        forbidden: characters that have probability 0; the others share theirs.
    """
    inputs = tokenizer(list(prompts), padding=True, return_tensors="pt")
    ids = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        suppress_tokens=tokenizer.convert_tokens_to_ids(list(forbidden)) if forbidden else None,
    )
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def character_tokenizer(characters: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of these characters, each a token, padding on the left as generation wants it.

    >>> len(character_tokenizer(["ab", "c"]))
    6
    """
    tokens = ["<pad>", "<s>", "</s>", *"".join(characters)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


ON_CPU: dict[str, Any] = {
    "base_adapters": [RETAIN],
    "weight_decay": 0.0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""TRL's settings of all these experiments: small models on a processor, nothing saved under way."""


def make_arguments(settings: ToySettings, seed: int, *, out: Path, **more: Any) -> RoutedGRPOConfig:
    """Return TRL's settings of GRPO; ``more`` are those of an arm."""
    options = dict(
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.generations,
        num_generations=settings.generations,
        max_completion_length=MAX_TOKENS,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.99,
        max_grad_norm=1.0,
        logging_steps=settings.evaluate_every,
        seed=seed,
    )
    return RoutedGRPOConfig(str(out), **(ON_CPU | options | more))
