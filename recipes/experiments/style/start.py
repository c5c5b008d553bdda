"""The start model of all arms: a small Llama trained on glosses, none of them in the style."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from experiments.common.cells import Site
from experiments.common.toy_model import make_model
from experiments.style.settings import Settings
from experiments.style.task import SEEN, TEMPLATES, glosses
from routed_peft.data import pack, train_tokenizer

LENGTH, BATCH = 128, 16


def make_start(site: Site, settings: Settings, seed: int) -> dict[str, Any]:
    """Train a tokenizer and the start model of a seed on glosses; nothing is measured."""
    set_seed(seed)
    texts = [f"{TEMPLATES[SEEN].format(term)} {gloss}" for term, gloss in glosses()[: settings.start_documents]]
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    model = make_model(
        settings, tokenizer, mlp=3, max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.02
    )
    args = TrainingArguments(
        str(site.folder / "trainer"),
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
    packed = pack(Dataset.from_dict({"text": texts}), tokenizer, length=LENGTH, seed=seed)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=packed)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(site.folder)
    tokenizer.save_pretrained(site.folder)
    return {}
