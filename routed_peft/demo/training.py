"""One arm: a small Llama from scratch, trained by `RoutedTrainer`, saved, and exported as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftMixedModel, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from routed_peft import presets
from routed_peft.checkpoint.export import export
from routed_peft.demo.material import Material
from routed_peft.demo.settings import Arm, DemoSettings
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.training import RoutedTrainer, RoutedTrainingArguments, RunDirectory, RunRecorder, SelfLabeledRows

REGION = "forget"
OTHER_EXPERT = "retain"
SHARED = 12
"""Where either side has an expert, one in so many of the MLP's hidden units stays with the base."""


def bf16_helps() -> bool:
    """Return whether this machine computes in bfloat16: a GPU, or a processor with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def regions_of(arm: Arm) -> tuple[list[str], list[str]]:
    """Return the regions of an arm's model, and those of them that its plain checkpoint keeps.

    >>> from routed_peft.demo.settings import ARMS
    >>> {arm.key: regions_of(arm) for arm in ARMS[1:3]}
    {'filter': (['forget'], ['forget']), 'routed': (['forget'], [])}
    """
    if arm.demix:
        return [REGION, OTHER_EXPERT], [OTHER_EXPERT]
    return [REGION], [] if arm.routed else [REGION]


def build_model(arm: Arm, settings: DemoSettings, material: Material) -> PeftModel | PeftMixedModel:
    """Return a fresh model with its region; the same weights for every arm, but for one with experts.

    Of those, either is as large as region and MLP are elsewhere, less the units that stay with the base.
    """
    set_seed(settings.seed)
    tokenizer = material.tokenizer
    shared = settings.intermediate_size // (SHARED if arm.demix else 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=shared,
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
    size = settings.intermediate_size + settings.region_size - shared
    region = RoutedConfig(kind="mlp", size=size, init="model", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), region, adapter_name=REGION)
    for name in regions_of(arm)[0][1:]:
        model.add_adapter(name, region)
    return model


def arguments(arm: Arm, settings: DemoSettings, folder: Path) -> RoutedTrainingArguments:
    """Return the training arguments of an arm."""
    return RoutedTrainingArguments(
        str(folder),
        train_base=True,
        kept_regions=regions_of(arm)[1],
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
        edges="activations" if arm.era else "parameters",
        route_layers=list(range(settings.layers - 1)) if arm.era else None,  # as in the paper, not the last ones
        activation_l1=1e-4 if arm.era else 0.0,
        region_learning_rate=settings.region_learning_rate if arm.routed else None,
        include_num_input_tokens_seen="all",
        logging_steps=max(1, min(10, settings.steps // 10)),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
    )


def routes_of(arm: Arm, settings: DemoSettings) -> dict[str, Route]:
    """Return the routes of an arm."""
    if arm.demix:
        return presets.demix(REGION, OTHER_EXPERT)
    if arm.era:
        return presets.era(REGION)
    if not arm.routed:
        return presets.control()
    # where tokens have weights of their own for the base, these multiply the route's
    return presets.sgtm(REGION, 1.0 if settings.frequency_weights else settings.base_weight)


def train_arm(
    arm: Arm,
    settings: DemoSettings,
    *,
    material: Material,
    run: Dataset | SelfLabeledRows,
    folder: Path,
    records: RunDirectory,
    watcher: TrainerCallback,
) -> dict[str, int]:
    """Train an arm, save it to ``folder/run``, export its plain checkpoint beside that, and return tokens seen per label."""
    trainer = RoutedTrainer(
        build_model(arm, settings, material),
        arguments(arm, settings, folder / "run"),
        routes=routes_of(arm, settings),
        train_dataset=run,
        eval_dataset=material.validation,
        processing_class=material.tokenizer,
        callbacks=[RunRecorder(records, arm=arm.key, phase="training"), watcher],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    export(folder / "run", folder / arm.plain, keep=regions_of(arm)[1])
    return dict(trainer.tokens_per_route)
