"""Fine-tune a frozen model with forget data in a LoRA of its own, and leave that LoRA out at the end.

    accelerate launch recipes/finetune.py --config recipes/configs/two_lora.yaml --model_name_or_path runs/sgtm-ablated
    accelerate launch recipes/finetune.py --config recipes/configs/two_lora.yaml --model_name_or_path ORG/MODEL \\
        --train_file my.jsonl --eval_files forget=forget.jsonl retain=retain.jsonl

Two LoRA adapters train side by side: `retain` belongs to the base and stays, `forget` is the region. The model's own
weights do not change. A YAML file holds fields of `Recipe` and of `RoutedTrainingArguments`; flags of the same names
override it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from routed_peft import Route, RoutedTrainer, RoutedTrainingArguments, ablate, presets
from routed_peft.data import (
    DocumentArguments,
    check_both_sides,
    check_evaluation,
    count_left_out,
    evaluation_rows,
    labeled_documents,
    labeled_tokens,
    pack,
    schedule,
    select_arm,
)
from routed_peft.evaluation.text_loss import check_length
from routed_peft.mistakes import check_numbers, option
from routed_peft.runs.begin import begin
from routed_peft.runs.command_line import parse_settings, run_recipe
from routed_peft.training import RoutedArguments, RunDirectory, RunRecorder
from routed_peft.training.self_label_config import setting

BASE_ADAPTER, REGION = "retain", "forget"


@dataclass
class Recipe(DocumentArguments):
    """Settings of this recipe, in addition to the training arguments."""

    model_name_or_path: str | None = option(None, "Checkpoint or Hub id. Required.")
    revision: str = option("main", "Branch, tag or commit of `model_name_or_path` on the Hub.")
    trust_remote_code: bool = option(False, "Run the code that the model brings along.")
    method: str = option("sgtm", "`sgtm` trains on labeled retain data without the region, `classic` with it; "
        "`control` routes nothing.", choices=["sgtm", "classic", "control"])  # fmt: skip
    arm: str = option("routed", "`routed`, or a run of equal length without routing: on all rows (`none`), on rows not "
        "labeled forget (`filter`), or on true retain rows (`perfect_filter`). Without routing, rows keep their "
        "natural shares.", choices=["routed", "none", "filter", "perfect_filter"])  # fmt: skip
    rank: int = option(16, "Rank of each LoRA.")
    lora_alpha: int = option(32, "Scale of each LoRA, multiplied by `rank`.")
    target_modules: list[str] = option(["all-linear"], "Names of linear layers, or `all-linear`.")

    labeled_first: float = setting("labeled_first", 0.0)
    first_forget_share: float = setting("first_forget_share", 0.5)
    forget_share: float | None = setting("forget_share", None)

    attn_implementation: str = option("auto", "Attention kernel; `auto` is eager on a CPU (fastest for short rows), "
        "otherwise sdpa.")  # fmt: skip
    ablate_to: str | None = option(None, "Directory of the ablated model; OUTPUT_DIR-ablated by default. `no` writes "
        "none.")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "rank", "lora_alpha", low=1)
        check_numbers(self, "labeled_first", "first_forget_share", "forget_share", high=1)


def main() -> None:
    recipe, args = parse_settings(Recipe, RoutedTrainingArguments)
    if recipe.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint or Hub id to fine-tune")
    args.train_sampling_strategy = "sequential"  # `schedule` is in order already
    args.include_num_input_tokens_seen = "all"
    args.dataloader_pin_memory = args.device.type != "cpu"
    args.train_base, args.base_adapters = False, [BASE_ADAPTER]
    args.kept_regions = [] if recipe.arm == "routed" else [REGION]
    run = RunDirectory(args.output_dir)
    target = run.ablation_target(recipe.ablate_to if recipe.arm == "routed" else "no")  # other arms keep their region
    begin(run, recipe, args=args, own=RoutedArguments.__annotations__)
    set_seed(args.seed)
    disable_progress_bars()  # while data is prepared

    where = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    own = partial(AutoTokenizer.from_pretrained, recipe.model_name_or_path, **where)
    documents = labeled_documents(recipe, own)
    model, tokenizer = build(recipe, args)
    check_length(model, tokenizer, length=recipe.length)
    held_out = evaluation_rows(recipe, tokenizer, documents=documents)
    check_evaluation(args, held_out)
    if recipe.arm == "routed":
        check_both_sides(documents)
    trainer = RoutedTrainer(
        model,
        args,
        routes=make_routes(recipe),
        train_dataset=training_rows(recipe, args, documents, tokenizer),
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        callbacks=[RunRecorder(run, method=recipe.method, arm=recipe.arm)],
    )
    labeled = labeled_tokens(documents, tokenizer, length=recipe.length, arm=recipe.arm, routes=method_routes(recipe))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    summary = {"method": recipe.method, "arm": recipe.arm, **trainer.run_summary(labeled)}
    if left_out := count_left_out(documents, recipe.arm, method_routes(recipe)):
        summary["left_out"] = left_out  # documents, by label or true side
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    if target:
        ablate(args.output_dir, target, trust_remote_code=recipe.trust_remote_code)
        summary["ablated"] = str(target)
    run.finish(summary)
    print(json.dumps(summary, indent=2))


def build(recipe: Recipe, args: RoutedTrainingArguments) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return the frozen model with two LoRA adapters, and its tokenizer."""
    attention = recipe.attn_implementation
    if attention == "auto":
        attention = "eager" if args.device.type == "cpu" else "sdpa"
    place = str(recipe.model_name_or_path)
    where: dict = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(place, **where)
    model = AutoModelForCausalLM.from_pretrained(place, **where, attn_implementation=attention)
    targets = "all-linear" if recipe.target_modules == ["all-linear"] else recipe.target_modules
    lora = partial(
        LoraConfig, r=recipe.rank, lora_alpha=recipe.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    routed = get_peft_model(model, lora(), adapter_name=BASE_ADAPTER)
    routed.add_adapter(REGION, lora())
    return routed, tokenizer


def make_routes(recipe: Recipe) -> dict[str, Route]:
    """Return the routes of the method, or weights of one in an arm without routing."""
    return method_routes(recipe) if recipe.arm == "routed" else presets.control()


def method_routes(recipe: Recipe) -> dict[str, Route]:
    """Return the routes of the method, whatever the arm."""
    if recipe.method == "control":
        return presets.control()
    if recipe.method == "sgtm":
        return presets.sgtm(REGION)
    flagged = presets.classic(REGION)
    return {"forget": flagged["flagged"], "retain": flagged["unflagged"], "unlabeled": flagged["unflagged"]}


def training_rows(
    recipe: Recipe, args: RoutedTrainingArguments, documents: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return the rows of this run in training order, with the same number of tokens in every arm."""
    rows = pack(
        select_arm(documents, recipe.arm, method_routes(recipe)), tokenizer, length=recipe.length, seed=args.seed
    )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    count = args.max_steps * per_step if args.max_steps > 0 else round(args.num_train_epochs * len(rows))
    args.max_steps = math.ceil(count / per_step)  # all epochs are in the rows already
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
    run_recipe(main)
