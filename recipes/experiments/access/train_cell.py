"""One cell: the models of an arm, trained and measured with every subset of their regions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, set_seed

from experiments.access.arms import ARMS, Arm
from experiments.access.material import Material
from experiments.access.measuring import measure
from experiments.access.settings import Settings
from experiments.common.cells import Site
from experiments.common.progress import Ticker
from routed_peft import presets
from routed_peft.checkpoint.load import load_routed
from routed_peft.data import RETAIN
from routed_peft.regions import RoutedConfig
from routed_peft.routes import Route
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.training import RegionSchedule, RoutedTrainer, RoutedTrainingArguments

Losses = dict[str, dict[str, float]]


def train_cell(site: Site, row: Mapping[str, Any], *, settings: Settings, split: str) -> dict[str, Any]:
    """Train the models of an arm, measure them, and return the numbers.

    Args:
        site: its directory gets ``run``. The tokenizer is in the parent's.
        row: ``arm`` and the ``seed`` of weights, rows and draws.
        settings: everything else.
        split: of the held-out text.

    Returns:
        ``losses``: subset of regions that are on, or of topics that a plain model saw, -> text -> nats per token; and the
        ``ledger``.
    """
    arm, seed = ARMS[row["arm"]], row["seed"]
    material = Material(site.parent, settings, seed=seed, split=split)
    make = {"plain": _plain, "branch": _branch}.get(arm.kind, _with_regions)
    losses, cost = make(site, arm, material=material)
    return {"losses": losses, "ledger": cost.to_dict()}


def build(material: Material) -> LlamaForCausalLM:
    """Return a fresh model: the same weights in every arm of a seed."""
    settings, tokenizer = material.settings, material.tokenizer
    set_seed(material.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"
    return LlamaForCausalLM(config)


def region_of(arm: Arm, settings: Settings) -> RoutedConfig:
    """Return the configuration of an arm's regions."""
    parts = settings.region if arm.region == "whole" else {"size": settings.region["size"]}
    return RoutedConfig(**parts, task_type="CAUSAL_LM")


def arguments(out: Path, material: Material, rows: int, **more: Any) -> RoutedTrainingArguments:
    """Return the training arguments of a run on so many rows."""
    settings = material.settings
    options = dict(
        train_base=True,
        max_steps=max(1, rows // settings.batch_size),
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.1,
        adam_beta2=0.95,
        include_num_input_tokens_seen="all",
        evaluate_ablated=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=50,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=material.seed,
    )
    return RoutedTrainingArguments(str(out), **{**options, **more})


def _plain(site: Site, arm: Arm, *, material: Material) -> tuple[Losses, TrainingCost]:
    topics = material.settings.topics
    choices: dict[str, list[list[str]]] = {"all": [topics], "none": [[]], "one": [[topic] for topic in topics]}
    losses: Losses = {}
    cost = TrainingCost()
    for some in choices[arm.topics]:
        name = "+".join(some) or "none"
        model, spent = train_plain(site, material, topics=some, out=site.folder / "run" / name)
        cost = cost + spent
        losses |= {name: measure(model, material, regions=[])["none"]}
    return losses, cost


def train_plain(
    site: Site, material: Material, *, topics: Collection[str], out: Path
) -> tuple[LlamaForCausalLM, TrainingCost]:
    """Train a model without regions on the core and some topics, save it to ``out``, and return it with its cost."""
    rows = material.rows(material.counts(topics)).select_columns(["input_ids"])
    model, args = build(material), arguments(out, material, len(rows))
    trainer = Trainer(model, args, train_dataset=rows, data_collator=_collate, callbacks=[Ticker(site.tick)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(out)
    tokens = args.max_steps * material.settings.batch_size * material.settings.length
    return model, TrainingCost.from_counts(matmul_parameters(model), tokens, steps=args.max_steps)


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _with_regions(site: Site, arm: Arm, *, material: Material) -> tuple[Losses, TrainingCost]:
    settings = material.settings
    rows = material.rows(material.counts(settings.topics))
    model: Any = build(material)
    for name in settings.topics:
        config = region_of(arm, settings)
        if name == settings.topics[0]:
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    consistency = settings.consistency if arm.consistency is None else arm.consistency
    if arm.kind == "routed":
        routes: Any = RegionSchedule(settings.topics, consistency=consistency, rate=settings.rate, seed=material.seed)
    else:
        routes = presets.control([RETAIN, *settings.topics])
    args = arguments(site.folder / "run", material, len(rows))
    cost = _train(site, model, args, routes=routes, rows=rows, material=material)
    return measure(model, material, regions=settings.topics), cost


def _train(
    site: Site, model: nn.Module, args: RoutedTrainingArguments, *, routes: Any, rows: Dataset, material: Material
) -> TrainingCost:
    trainer = RoutedTrainer(
        model,
        args,
        routes=routes,
        train_dataset=rows,
        processing_class=material.tokenizer,
        callbacks=[Ticker(site.tick)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    cost = TrainingCost.from_dict(trainer.run_summary()["ledger"])
    trainer.routing.detach()
    return cost


def _branch(site: Site, arm: Arm, *, material: Material) -> tuple[Losses, TrainingCost]:
    """Train the core, then one region after the other on the frozen base; switch any of them on together."""
    settings, run = material.settings, site.folder / "run"
    _, cost = train_plain(site, material, topics=[], out=run / "base")
    counts = material.counts(settings.topics)
    for name in settings.topics:
        share = (
            settings.branch_core * counts[name] / sum(n for text, n in counts.items() if text not in settings.topics)
        )
        core = {text: round(share * n) for text, n in counts.items() if text not in settings.topics}
        rows = material.rows({name: counts[name], **core})
        base = LlamaForCausalLM.from_pretrained(run / "base", attn_implementation="eager")
        set_seed(material.seed)
        model = get_peft_model(base, region_of(arm, settings), adapter_name=name)
        args = arguments(
            run / name, material, len(rows), train_base=False, learning_rate=settings.rate * settings.learning_rate
        )
        routes = {name: Route(), RETAIN: Route()}
        cost = cost + _train(site, model, args, routes=routes, rows=rows, material=material)
    first = settings.topics[0]
    folders = {name: run / name / name for name in settings.topics}
    together = load_routed(run / first, folders, attn_implementation="eager")
    return measure(together, material, regions=settings.topics), cost
