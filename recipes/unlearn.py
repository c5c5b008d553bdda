"""Unlearn after training by changing outputs: the baselines of gradient routing.

    accelerate launch recipes/unlearn.py --config recipes/configs/unlearn_npo.yaml --model_name_or_path ORG/MODEL
    accelerate launch recipes/unlearn.py --config recipes/configs/unlearn_rmu.yaml --model_name_or_path ORG/MODEL \\
        --train_file my.jsonl --eval_files forget=forget.jsonl retain=retain.jsonl

All weights are trained (by RMU, a few matrices) on rows labeled forget or retain; unlabeled text is not used. A YAML file
holds fields of `Recipe` and of `UnlearningArguments`; flags of the same names override it. The output is a plain checkpoint;
its `unlearning.json` records the cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase, set_seed

from routed_peft.checkpoint.staging import atomic_directory
from routed_peft.data import DocumentArguments, check_evaluation, evaluation_rows, labeled_documents, pack
from routed_peft.evaluation.source import open_plain
from routed_peft.evaluation.text_loss import check_length
from routed_peft.files import write_json
from routed_peft.mistakes import check_numbers, option
from routed_peft.runs.begin import begin
from routed_peft.runs.command_line import parse_settings, run_recipe
from routed_peft.training import RunDirectory, RunRecorder
from routed_peft.unlearning import UNLEARNED, UnlearningArguments, mean_loss, read_cost, unlearn

SIDES = ("forget", "retain")


@dataclass
class Recipe(DocumentArguments):
    """Settings of this recipe, in addition to the training arguments."""

    model_name_or_path: str | None = option(None, "Checkpoint, run (without its regions) or Hub id. Required.")
    trust_remote_code: bool = option(False, "Run the code that the model brings along.")
    revision: str | None = option(None, "Branch, tag or commit of `model_name_or_path` on the Hub.")
    forget_rows: int | None = option(None, "Maximum number of labeled forget rows.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "forget_rows", low=1)


def main() -> None:
    recipe, args = parse_settings(Recipe, UnlearningArguments)
    if recipe.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the checkpoint or Hub id in which to unlearn")
    args.include_num_input_tokens_seen = "non_padding"
    former = read_cost(recipe.model_name_or_path)  # errors in it are raised before training
    run = RunDirectory(args.output_dir)
    if args.process_index == 0:
        run.check_separate(recipe.model_name_or_path, resume=bool(args.resume_from_checkpoint))
    begin(run, recipe, args=args, own=UnlearningArguments.__annotations__)
    set_seed(args.seed)
    disable_progress_bars()  # while data is prepared

    where = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    model, tokenizer = open_plain(recipe.model_name_or_path, **where)
    check_length(model, tokenizer, length=recipe.length)
    documents = labeled_documents(recipe, lambda: tokenizer)
    rows = labeled_rows(recipe, documents, tokenizer)
    held_out = evaluation_rows(recipe, tokenizer, documents=documents)
    check_evaluation(args, held_out)
    before = {side: mean_loss(model, ds) for side, ds in held_out.items()}
    model, ledger = unlearn(
        model,
        rows["forget"],
        retain_rows=rows.get("retain"),
        args=args,
        eval_dataset=held_out or None,
        tokenizer=tokenizer,
        callbacks=[RunRecorder(run, method=args.method)],
    )
    summary = {
        "method": args.method,
        "source": recipe.model_name_or_path,
        "losses_before": before,
        "losses": {side: mean_loss(model, ds) for side, ds in held_out.items()},
        "ledger": ledger.to_dict(),
        "total_ledger": None if former is None else (former + ledger).to_dict(),
    }
    if args.process_index == 0:
        with atomic_directory(Path(args.output_dir)) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            write_json(aside / UNLEARNED, summary)
        run.finish(summary)
        print(json.dumps(summary, indent=2))


def labeled_rows(recipe: Recipe, ds: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Return the packed rows with a label, by side."""
    documents = {side: ds.filter(lambda label, s=side: label == s, input_columns="route_label") for side in SIDES}
    if not len(documents["forget"]):
        raise ValueError(
            f"no document is labeled forget; the labels are {sorted(set(ds['route_label']))}: label some, for example with "
            "`label_keywords`"
        )
    rows = {side: pack(part, tokenizer, length=recipe.length, by=[]) for side, part in documents.items() if len(part)}
    if recipe.forget_rows is not None:
        rows["forget"] = rows["forget"].select(range(min(recipe.forget_rows, len(rows["forget"]))))
    return rows


if __name__ == "__main__":
    run_recipe(main)
