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
import math
from dataclasses import dataclass, field

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import TrlParser

from routed_peft import Route, RoutedTrainer, RoutedTrainingArguments, ablate, presets
from routed_peft.data import (
    DocumentArguments,
    check_evaluation,
    evaluation_rows,
    labeled_documents,
    labeled_tokens,
    pack,
    schedule,
    select_arm,
)
from routed_peft.evaluation.text_loss import check_length
from routed_peft.runs.begin import begin
from routed_peft.training import RoutedArguments, RunDirectory, RunRecorder
from routed_peft.training.self_label_config import setting

BASE_ADAPTER, REGION = "retain", "forget"


@dataclass
class Recipe(DocumentArguments):
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

    labeled_first: float = setting("labeled_first", 0.0)
    first_forget_share: float = setting("first_forget_share", 0.5)
    forget_share: float | None = setting("forget_share", None)

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
    args.kept_regions = [] if recipe.arm == "routed" else [REGION]
    run = RunDirectory(args.output_dir)
    target = run.ablation_target(recipe.ablate_to if recipe.arm == "routed" else "no")  # other arms keep what they have
    begin(run, recipe, args=args, own=RoutedArguments.__annotations__)
    set_seed(args.seed)
    disable_progress_bars()  # of the preparation of data

    documents = labeled_documents(recipe)
    model, tokenizer = build(recipe, args)
    check_length(model, tokenizer, length=recipe.length)
    held_out = evaluation_rows(recipe, tokenizer)
    check_evaluation(args, held_out)
    trainer = RoutedTrainer(
        model,
        args,
        routes=make_routes(recipe),
        train_dataset=training_rows(recipe, args, documents, tokenizer),
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        callbacks=[RunRecorder(run, method=recipe.method, arm=recipe.arm)],
    )
    labeled = labeled_tokens(documents, tokenizer, length=recipe.length, arm=recipe.arm)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    summary = {"method": recipe.method, "arm": recipe.arm, **trainer.run_summary(labeled)}
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
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


def training_rows(
    recipe: Recipe, args: RoutedTrainingArguments, documents: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return the rows of this run in their order: the same number of tokens in every arm."""
    rows = pack(select_arm(documents, recipe.arm), tokenizer, length=recipe.length, seed=args.seed)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    count = args.max_steps * per_step if args.max_steps > 0 else round(args.num_train_epochs * len(rows))
    args.max_steps = math.ceil(count / per_step)  # all epochs are laid out here, and not to be repeated
    first, share = (recipe.labeled_first, recipe.forget_share) if recipe.arm == "routed" else (0.0, None)
    return schedule(
        rows,
        count,
        labeled_first=first,
        forget_share=share,
        seed=args.seed,
        first_forget_share=recipe.first_forget_share,
    )


if __name__ == "__main__":
    main()
