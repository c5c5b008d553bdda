"""One arm: a small Llama from scratch, trained by `RoutedTrainer`, saved, and exported as a plain checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftMixedModel, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from routed_peft.checkpoint.export import export
from routed_peft.demo.material import Material
from routed_peft.demo.settings import Arm, DemoSettings
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.training import RoutedTrainer, RoutedTrainingArguments, RunDirectory, RunRecorder, SelfLabeledRows

REGION = "forget"


def bf16_helps() -> bool:
    """Return whether this machine computes in bfloat16: a GPU, or a processor with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def build_model(settings: DemoSettings, material: Material) -> PeftModel | PeftMixedModel:
    """Return a fresh model with its region; the same weights for every arm."""
    region = RoutedConfig(kind="mlp", size=settings.region_size, init="model", task_type="CAUSAL_LM")
    return get_peft_model(bare_model(settings, material), region, adapter_name=REGION)


def bare_model(settings: DemoSettings, material: Material) -> LlamaForCausalLM:
    """Return a fresh model without regions."""
    set_seed(settings.seed)
    tokenizer = material.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=max(settings.length, 128),  # room for a question and a choice
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # on the processor and at this length plain matmuls are faster by a third
    config._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"
    return LlamaForCausalLM(config)


def arguments(arm: Arm, settings: DemoSettings, folder: Path) -> RoutedTrainingArguments:
    """Return the training arguments of an arm."""
    return RoutedTrainingArguments(
        str(folder),
        train_base=True,
        kept_regions=[] if arm.routed else [REGION],
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        clip_per_group=False,  # as the published results were made; arms with and without routes are then clipped alike
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16_helps(),
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // settings.evaluations),
        evaluate_ablated=arm.routed,
        include_num_input_tokens_seen="all",
        logging_steps=max(1, min(10, settings.steps // 10)),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )


def train_arm(
    arm: Arm,
    model: nn.Module,
    *,
    args: RoutedTrainingArguments,
    routes: Mapping[str, Route],
    material: Material,
    run: Dataset | SelfLabeledRows,
    records: RunDirectory,
    watcher: TrainerCallback,
) -> dict[str, int]:
    """Train an arm, save it, export its plain checkpoint beside ``args.output_dir``, and return tokens seen per label."""
    trainer = RoutedTrainer(
        model,
        args,
        routes=routes,
        train_dataset=run,
        eval_dataset=material.validation,
        processing_class=material.tokenizer,
        callbacks=[RunRecorder(records, arm=arm.key, phase="training"), watcher],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    place = Path(str(args.output_dir))
    export(place, place.with_name(arm.plain), keep=args.kept_regions)
    return dict(trainer.tokens_per_route)
