"""UNDO: make unlearning robust against relearning, by noise and distillation.

    accelerate launch recipes/undo.py --config recipes/configs/undo.yaml --model_name_or_path runs/unlearn_maxent
    accelerate launch recipes/undo.py --config recipes/configs/undo.yaml --model_name_or_path runs/sgtm \\
        --text_files pretraining.jsonl --eval_files retain=retain.jsonl

The teacher is any checkpoint with suppressed knowledge; of a routed run, it is the ablated model. The text needs no labels.
A YAML file holds fields of `Recipe` and of `UndoArguments`; flags of the same names override it. The output is a plain
checkpoint; its `undo.json` records the settings and the cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase, set_seed

from routed_peft.corpora import load_pair
from routed_peft.data import RETAIN, DocumentArguments, check_evaluation, evaluation_rows, load_texts, pack
from routed_peft.data.loading import TextFormat
from routed_peft.evaluation.source import open_plain
from routed_peft.evaluation.text_loss import check_length
from routed_peft.mistakes import check_numbers, option
from routed_peft.runs.begin import begin
from routed_peft.runs.command_line import parse_settings, run_recipe
from routed_peft.training import RunDirectory, RunRecorder
from routed_peft.unlearning import UndoArguments, check_tokenizers, mean_loss, save_student, undo
from routed_peft.unlearning.data import check_held_out


@dataclass
class Recipe:
    """Settings of this recipe, in addition to the training arguments."""

    model_name_or_path: str | None = option(None, "The teacher: checkpoint, run (without its regions) or Hub id. "
        "Required.")  # fmt: skip
    trust_remote_code: bool = option(False, "Run the code that the model brings along.")
    revision: str | None = option(None, "Branch, tag or commit of `model_name_or_path` on the Hub.")
    student: str | None = option(None, "Checkpoint to add noise to and to train; by default a copy of the teacher.")
    pair: str = option("biology", "Built-in text, both sides together: biology, spanish, entangled or arithmetic.")
    text_files: list[str] = option([], "JSONL, JSON, Parquet, plain text or Hub datasets, in place of `pair`.")
    text_column: str = option("text", "Column of the text, or of chats, in all of these files.")
    text_template: str | None = option(None, 'Text made of columns, such as "{question} {answer}", instead of '
        "`text_column`.")  # fmt: skip
    eval_files: list[str] = option([], "Held-out text as name=FILE; the loss on the one named retain ends training.")
    length: int = option(128, "Tokens per row.")

    def __post_init__(self) -> None:
        check_numbers(self, "length", low=2)


def main() -> None:
    recipe, args = parse_settings(Recipe, UndoArguments)
    if recipe.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is not set: name the teacher, a checkpoint or Hub id")
    args.include_num_input_tokens_seen = "non_padding"
    run = RunDirectory(args.output_dir)
    if args.process_index == 0:
        run.check_separate(recipe.model_name_or_path, resume=bool(args.resume_from_checkpoint))
    begin(run, recipe, args=args, own=("alpha", "beta", "topk", "tolerance"))
    set_seed(args.seed)
    disable_progress_bars()  # while data is prepared

    trust = {"trust_remote_code": recipe.trust_remote_code}
    teacher, tokenizer = open_plain(recipe.model_name_or_path, revision=recipe.revision, **trust)
    check_length(teacher, tokenizer, length=recipe.length)
    rows = pack(text(recipe, tokenizer), tokenizer, length=recipe.length, by=[])
    held_out = held_out_rows(recipe, tokenizer)
    check_evaluation(args, held_out)
    if RETAIN in held_out:
        check_held_out(rows, held_out[RETAIN], name="text_files", held_out_name="eval_files")
    student = None
    if recipe.student:
        student, other = open_plain(recipe.student, **trust)
        check_tokenizers(tokenizer, other)
    student, record = undo(
        teacher,
        rows,
        args=args,
        retain_rows=held_out.get(RETAIN),
        student=student,
        eval_dataset=held_out,
        tokenizer=tokenizer,
        callbacks=[RunRecorder(run, method="undo", alpha=args.alpha, beta=args.beta)],
    )
    losses = {side: mean_loss(student, ds) for side, ds in held_out.items()}
    if args.process_index == 0:
        content = save_student(
            student, record, out=args.output_dir, source=recipe.model_name_or_path, tokenizer=tokenizer
        )
        run.finish({**content, "losses": losses})
        print(json.dumps({**content, "losses": losses}, indent=2))


def text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the unlabeled text to distill on."""
    if not recipe.text_files:
        return load_pair(recipe.pair).select_columns("text")
    form = TextFormat(recipe.text_column, recipe.text_template, lambda: tokenizer)
    return load_texts(recipe.text_files, argument="text_files", form=form)


def held_out_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Return held-out rows by name."""
    if recipe.eval_files and not recipe.text_files:
        raise ValueError(
            f"`eval_files` need `text_files`, got none: leave them out; the pair `{recipe.pair}` has its own"
        )
    names = [entry.split("=")[0] for entry in recipe.eval_files if "=" in entry]
    if names and RETAIN not in names:
        raise ValueError(
            f"`eval_files` has {', '.join(names)} but no {RETAIN}=FILE, whose loss ends training: add it, or leave "
            "`eval_files` out, with `--eval_strategy no`, to train for the full number of steps"
        )
    about = DocumentArguments(
        recipe.pair,
        recipe.text_files[0] if recipe.text_files else None,  # any of them, since only held-out text is read
        text_column=recipe.text_column,
        text_template=recipe.text_template,
        eval_files=recipe.eval_files,
        length=recipe.length,
    )
    return evaluation_rows(about, tokenizer)


if __name__ == "__main__":
    run_recipe(main)
