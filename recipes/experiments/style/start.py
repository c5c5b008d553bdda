"""The model that all arms start from: a small Llama that has read glosses, none of them in the style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from experiments.common.cells import ensure
from experiments.style.settings import Settings, start_key
from experiments.style.task import SEEN, TEMPLATES, glosses
from routed_peft.data import pack, train_tokenizer

LENGTH, BATCH = 128, 16


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return an untrained Llama."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = "eager"  # the fastest for short rows on a CPU
    return LlamaForCausalLM(config)


def train_start(settings: Settings, seed: int, folder: Path) -> None:
    """Train a tokenizer and a model on glosses, and save both to ``folder``."""
    set_seed(seed)
    texts = [f"{TEMPLATES[SEEN].format(term)} {gloss}" for term, gloss in glosses()[: settings.start_documents]]
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    model = make_model(settings, tokenizer)
    args = TrainingArguments(
        str(folder / "trainer"),
        max_steps=settings.start_steps,
        per_device_train_batch_size=BATCH,
        learning_rate=settings.start_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, settings.start_steps // 10),
        weight_decay=0.1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    packed = pack(Dataset.from_dict({"text": texts}), tokenizer, LENGTH, seed=seed)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=packed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ensure_start(settings: Settings, seed: int, place: Path) -> Path:
    """Return the directory of the start model of a seed below ``place``, trained there if it is not yet."""
    folder = place / start_key(settings, seed)

    def make() -> dict[str, Any]:
        train_start(settings, seed, folder)
        return {}

    ensure(folder, make)
    return folder
