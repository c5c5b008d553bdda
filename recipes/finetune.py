"""Fine-tune a frozen model so that forget data goes into a LoRA of its own, and leave that LoRA out at the end.

    accelerate launch recipes/finetune.py --config recipes/configs/two_lora.yaml --model_name_or_path runs/sgtm-ablated
    accelerate launch recipes/finetune.py --config recipes/configs/two_lora.yaml --model_name_or_path ORG/MODEL \\
        --train_file my.jsonl --eval_files forget=forget.jsonl retain=retain.jsonl

Two LoRA adapters train side by side: `retain` belongs to the base and stays, `forget` is the region. The model's own
weights do not move. A YAML holds the fields of `Recipe` and of `RoutedTrainingArguments`; flags of the same names override
it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import TrlParser

from routed_peft import Route, RoutedTrainer, RoutedTrainingArguments, ablate, presets
from routed_peft.corpora import load_pair
from routed_peft.data import (
    labels_from_column,
    labels_from_keywords,
    load_training_file,
    pack,
    schedule,
    simulate_labels,
)
from routed_peft.training import RunDirectory, RunRecorder

BASE_ADAPTER, REGION = "retain", "forget"


@dataclass
class Recipe:
    """What this recipe is told beside the training arguments."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint or Hub id. Required."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub id."})
    method: str = field(
        default="sgtm",
        metadata={
            "help": "sgtm: labelled retain data is seen without the region. classic: with it. control: no routing.",
            "choices": ["sgtm", "classic", "control"],
        },
    )
    arm: str = field(
        default="routed",
        metadata={
            "help": "routed; or the same budget without routing on: all rows (none), rows not labelled forget (filter), "
            "true retain rows (perfect_filter). Rows of arms without routing come in their natural shares.",
            "choices": ["routed", "none", "filter", "perfect_filter"],
        },
    )
    rank: int = field(default=16, metadata={"help": "Rank of either LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of either LoRA, times `rank`."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of linear layers, or all-linear."}
    )

    pair: str = field(default="biology", metadata={"help": "Built-in text: biology, spanish or entangled."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSONL, Parquet or Hub dataset, in place of `pair`: text, and route_label or side."},
    )
    eval_files: list[str] = field(default_factory=list, metadata={"help": "name=FILE for each side, with text."})
    length: int = field(default=128, metadata={"help": "Tokens per row."})

    labeled: float = field(default=1.0, metadata={"help": "Share of documents that carry a label at all."})
    labeled_forget: float | None = field(default=None, metadata={"help": "The same, for the forget side alone."})
    labeled_retain: float | None = field(default=None, metadata={"help": "The same, for the retain side alone."})
    recall: float = field(default=1.0, metadata={"help": "Share of labelled forget documents labelled forget."})
    precision: float = field(default=1.0, metadata={"help": "Share of documents labelled forget that are."})
    label_seed: int = field(
        default=0, metadata={"help": "Decides which documents lose their label, or get a wrong one."}
    )
    label_keywords: list[str] = field(
        default_factory=list, metadata={"help": "Label documents with one of these words forget, all others retain."}
    )
    labeled_first: float = field(default=0.0, metadata={"help": "Share of the run that takes labelled rows only."})
    forget_share: float | None = field(default=None, metadata={"help": "Share of labelled forget rows after that."})

    attn_implementation: str = field(
        default="auto", metadata={"help": "auto: eager on a CPU, where it is the fastest for short rows."}
    )
    ablate_to: str | None = field(
        default=None, metadata={"help": "Where the ablated model goes; OUTPUT_DIR-ablated by default; `no`: nowhere."}
    )


def main() -> None:
    recipe, args = TrlParser((Recipe, RoutedTrainingArguments)).parse_args_and_config()
    if recipe.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint or Hub id to fine-tune")
    args.train_sampling_strategy = "sequential"  # `schedule` is in order already
    args.include_num_input_tokens_seen = "all"
    args.dataloader_pin_memory = args.device.type != "cpu"
    args.train_base, args.base_adapters = False, [BASE_ADAPTER]
    run, target = RunDirectory(args.output_dir), ablation_target(recipe, args)
    if args.process_index == 0:
        seeds = {"seed": args.seed, "label_seed": recipe.label_seed}
        config = {"recipe": asdict(recipe), "training": args.to_dict()}
        run.start(config, seeds, resume=bool(args.resume_from_checkpoint))
    set_seed(args.seed)
    disable_progress_bars()  # of the preparation of data

    model, tokenizer = build(recipe, args)
    trainer = RoutedTrainer(
        model,
        args,
        routes=make_routes(recipe),
        train_dataset=training_rows(recipe, args, tokenizer),
        eval_dataset=evaluation_rows(recipe, tokenizer),
        processing_class=tokenizer,
        callbacks=[RunRecorder(run, method=recipe.method, arm=recipe.arm)],
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    losses = final_losses(trainer)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    summary = {
        "method": recipe.method,
        "arm": recipe.arm,
        "steps": result.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_route": dict(trainer.tokens_per_route),
        "seconds": result.metrics["train_runtime"],
        "losses": losses,
    }
    if target:
        ablate(args.output_dir, target)
        summary["ablated"] = str(target)
    run.finish(summary)
    print(json.dumps(summary, indent=2))


def build(recipe: Recipe, args: RoutedTrainingArguments) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return the frozen model with two LoRA adapters, and its tokenizer."""
    attention = recipe.attn_implementation
    if attention == "auto":
        attention = "eager" if args.device.type == "cpu" else "sdpa"
    place, revision = recipe.model_name_or_path, recipe.revision
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(place, revision=revision, attn_implementation=attention)
    targets = "all-linear" if recipe.target_modules == ["all-linear"] else recipe.target_modules
    lora = {"r": recipe.rank, "lora_alpha": recipe.lora_alpha, "target_modules": targets, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**lora), adapter_name=BASE_ADAPTER)
    model.add_adapter(REGION, LoraConfig(**lora))
    return model, tokenizer


def make_routes(recipe: Recipe) -> dict[str, Route]:
    """Return the routes of the method, or all ones where this arm does not route."""
    if recipe.arm != "routed" or recipe.method == "control":
        return presets.control()
    if recipe.method == "sgtm":
        return presets.sgtm(REGION)
    flagged = presets.classic(REGION)
    return {"forget": flagged["flagged"], "retain": flagged["unflagged"], "unlabeled": flagged["unflagged"]}


def labeled_documents(recipe: Recipe) -> Dataset:
    """Return documents with their label (``route_label``) and, where it is known, their true ``side``."""
    ds = load_training_file(recipe.train_file, columns=["text"]) if recipe.train_file else load_pair(recipe.pair)
    truth = "side" if "side" in ds.column_names else "route_label"
    if recipe.label_keywords:
        ds, truth = labels_from_keywords(ds, {"forget": recipe.label_keywords}, default="retain"), "route_label"
    elif "route_label" not in ds.column_names:
        ds = labels_from_column(ds, "side", {"forget": "forget", "retain": "retain"})
    sides = {"forget": recipe.labeled_forget, "retain": recipe.labeled_retain}
    labeled = {side: recipe.labeled if share is None else share for side, share in sides.items()}
    if {*labeled.values(), recipe.recall, recipe.precision} != {1.0}:
        ds = simulate_labels(ds, truth, labeled, recipe.recall, recipe.precision, recipe.label_seed)
    return ds


def of_arm(ds: Dataset, arm: str) -> Dataset:
    """Return the rows or documents that an arm trains on."""
    column = {"filter": "route_label", "perfect_filter": "side"}.get(arm)
    if column is None:
        return ds
    if column not in ds.column_names:
        raise ValueError(f"`arm: {arm}` needs the column `{column}`, what documents truly are; got {ds.column_names}")
    return ds.filter(lambda value: value != "forget", input_columns=column)


def training_rows(recipe: Recipe, args: RoutedTrainingArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the rows of this run in their order: the same number of tokens in every arm."""
    rows = pack(of_arm(labeled_documents(recipe), recipe.arm), tokenizer, recipe.length, seed=args.seed)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    count = args.max_steps * per_step if args.max_steps > 0 else round(args.num_train_epochs * len(rows))
    first, share = (recipe.labeled_first, recipe.forget_share) if recipe.arm == "routed" else (0.0, None)
    return schedule(rows, count, first, share, args.seed)


def evaluation_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset] | None:
    """Return held-out rows by side."""
    if recipe.train_file:
        pairs = (entry.split("=", 1) for entry in recipe.eval_files)
        sides = {name: load_training_file(file, columns=["text"]) for name, file in pairs}
    else:
        ds = load_pair(recipe.pair, "validation")
        sides = {name: ds.filter(lambda side, n=name: side == n, input_columns="side") for name in ("forget", "retain")}
    return {name: pack(ds, tokenizer, recipe.length, by=[]) for name, ds in sides.items()} or None


def ablation_target(recipe: Recipe, args: RoutedTrainingArguments) -> Path | None:
    """Return where the ablated model goes, and fail now rather than after training where that is not free."""
    if recipe.ablate_to == "no" or recipe.arm != "routed":  # the others keep both adapters
        return None
    target = Path(recipe.ablate_to or f"{Path(args.output_dir)}-ablated")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"`ablate_to` {target} is not empty: name another directory, or `no`")
    return target


def final_losses(trainer: RoutedTrainer) -> dict[str, float]:
    """Return the loss of every side, with the region and ablated, in nats per token; evaluate where that is not done."""
    last = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
    done = [entry for entry in last if any(key.startswith("eval_") for key in entry)]
    if trainer.eval_dataset and not done:
        done = [trainer.evaluate()]
    return {key[5:-5]: loss for entry in done for key, loss in entry.items() if key.endswith("_loss")}


if __name__ == "__main__":
    main()
