"""Train a small language model with a region or several, from scratch or from a checkpoint, and ablate them at the end.

    accelerate launch recipes/pretrain.py --config recipes/configs/self_labels.yaml
    accelerate launch recipes/pretrain.py --config recipes/configs/self_labels.yaml --labeled 0.25 --output_dir runs/quarter
    accelerate launch recipes/pretrain.py --config recipes/configs/self_labels.yaml --arm filter --output_dir runs/filter

A YAML file holds fields of `Recipe` and of `RoutedTrainingArguments`; flags of the same names override it. Choose a preset
with ``method``, or write the routes of another method under ``routes``. By default the region labels unlabeled rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging

from experiments.common.coherence import MAX_ROWS, restore_coherence
from experiments.common.region_arguments import RegionArguments
from routed_peft import Route, RoutedTrainer, RoutedTrainingArguments, export, presets
from routed_peft.adapters import adapter_names
from routed_peft.checkpoint.staging import atomic_directory, files_in, sha256
from routed_peft.data import (
    UNLABELED,
    DocumentArguments,
    add_frequency_weights,
    check_both_sides,
    check_evaluation,
    count_left_out,
    evaluation_rows,
    labeled_documents,
    labeled_tokens,
    pack,
    schedule,
    select_arm,
    token_frequency_weights,
    train_tokenizer,
)
from routed_peft.evaluation import load_source
from routed_peft.evaluation.placebo import silence_random_units
from routed_peft.evaluation.source import load_tokenizer, open_plain, open_source
from routed_peft.evaluation.text_loss import check_length
from routed_peft.files import write_json
from routed_peft.mistakes import check_numbers, option
from routed_peft.routes import Routes, check_region_name, routes_from_dict
from routed_peft.runs.begin import begin
from routed_peft.runs.command_line import parse_settings, run_recipe
from routed_peft.runs.records import PLACEBO
from routed_peft.training import (
    RegionSchedule,
    RoutedArguments,
    RunDirectory,
    RunRecorder,
    SelfLabelConfig,
    SelfLabeledRows,
)
from routed_peft.training.self_label_config import SETTING_NAMES, setting
from routed_peft.unlearning import mean_loss

logger = logging.get_logger(__name__)

PLACEBOS = ("control", "random")
RECOMMENDED = SelfLabelConfig(robust_share=0.05)


@dataclass
class Recipe(RegionArguments, DocumentArguments):
    """Settings of this recipe, in addition to the training arguments."""

    method: str = option("sgtm", "Preset of routes; `access` trains `regions` that work when they are on. Placebos route "
        "nothing: `control` ablates the region nevertheless, `random` silences equally many random units of every MLP "
        "instead.", choices=["sgtm", "era", "demix", "access", *PLACEBOS])  # fmt: skip
    routes: dict | str | None = option(None, "Routes in place of those of `method`: {label: {weights, ablated}}.")
    base_weight: float | None = option(None, "Gradient weight of the base on labeled forget data; by default that of "
        "`method`.")  # fmt: skip
    arm: str = option("routed", "`routed`, or a run of equal length without routing: on all rows (`none`), on rows not "
        "labeled forget (`filter`), or on true retain rows (`perfect_filter`). Without routing, rows keep their "
        "natural shares.", choices=["routed", "none", "filter", "perfect_filter"])  # fmt: skip

    vocab_size: int = option(2048, "Entries of the new tokenizer if no model is given.")
    self_labels: bool | None = option(None, "Let the region label the unlabeled rows after `labeled_first` of the run. "
        "By default it does with `method: sgtm`, if rows of either side have labels.")  # fmt: skip
    # With None, `self_labels` has the values of `RECOMMENDED`; without it, all labels are taken in their natural shares.
    labeled_first: float | None = setting("labeled_first", None)
    first_forget_share: float | None = setting("first_forget_share", None)
    forget_share: float | None = setting("forget_share", None)
    threshold: str = setting("threshold")
    score_again_at: float | None = setting("score_again_at")
    robust_share: float | None = setting("robust_share", None)
    overrule: bool = setting("overrule")
    by_document: bool = option(False, "With `self_labels`: label whole documents, even if they share a row, instead of "
        "rows.")  # fmt: skip
    frequency_weights: bool = option(False, "ERA: do not block tokens that are equally common on the retain side.")
    frequency_bias: float = option(4.0, "ERA: frequency ratio from which tokens are blocked.")
    frequency_count: float = option(20.0, "ERA: retain occurrences added to every token.")

    model_name_or_path: str | None = option(None, "Checkpoint, run or Hub id to continue from; by default, a new Llama "
        "(sizes below).")  # fmt: skip
    trust_remote_code: bool = option(False, "Run the code that the model brings along.")
    num_hidden_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    num_attention_heads: int = 4
    attn_implementation: str = option("auto", "Attention kernel; `auto` is eager on a CPU (fastest for short rows), "
        "otherwise sdpa.")  # fmt: skip

    ablate_to: str | None = option(None, "Directory of the ablated model; OUTPUT_DIR-ablated by default. `no` writes "
        "none.")  # fmt: skip
    coherence_steps: int = option(0, "ERA: maximum of steps on 64 retain rows after ablation; the result goes to "
        "…-coherent.")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.take_regions(scheduled=self.method == "access")
        if self.method == "access":
            self._check_access()
        if self.method == "random" and self.region_config().given_parts() != ["size"]:
            raise ValueError("`method: random` silences as many units as `size`: give no other part of the region")
        check_numbers(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", low=1)
        check_numbers(self, "num_attention_heads", low=1)
        check_numbers(self, "labeled_first", "first_forget_share", "forget_share", "robust_share", high=1)
        check_numbers(self, "frequency_bias", "frequency_count", "coherence_steps")
        check_numbers(self, "base_weight", low=-math.inf)

    def _check_access(self) -> None:
        if self.self_labels:
            raise ValueError(
                f"`self_labels` tells forget rows from others, got the regions {self.regions}: leave it out"
            )
        odd = ("routes", "base_weight", "labeled_first", "first_forget_share", "forget_share", "frequency_weights")
        for name in (*odd, "coherence_steps"):
            if getattr(self, name) != getattr(Recipe, name):
                raise ValueError(f"`{name}` is not for `method: access`, got {getattr(self, name)!r}: leave it out")


def main() -> None:
    recipe, args = parse_settings(Recipe, RoutedTrainingArguments)
    args.train_sampling_strategy = "sequential"  # `schedule` is in order already
    args.include_num_input_tokens_seen = "all"
    args.dataloader_pin_memory = args.device.type != "cpu"
    args.evaluate_ablated &= recipe.method != "random"  # it silences units outside the region
    if recipe.coherence_steps < 0:
        raise ValueError(f"`coherence_steps` is {recipe.coherence_steps}: give the number of steps, 0 for none")
    check_region_name(recipe.region)
    run = RunDirectory(args.output_dir)
    target = run.ablation_target(recipe.ablate_to if recipe.arm == "routed" else "no")  # other arms keep their region
    begin(run, recipe, args=args, own=RoutedArguments.__annotations__)
    set_seed(args.seed)
    disable_progress_bars()  # while data is prepared

    place = recipe.model_name_or_path
    own = partial(load_tokenizer, place, trust_remote_code=recipe.trust_remote_code) if place else None
    documents = labeled_documents(recipe, own)
    model, tokenizer = build(recipe, args, documents)
    args.continue_run(model)
    args.kept_regions = kept_regions(recipe, args, model)
    check_length(model, tokenizer, length=recipe.length)
    held_out = evaluation_rows(recipe, tokenizer, documents=documents)
    check_evaluation(args, held_out)
    if recipe.arm == "routed":
        check_both_sides(documents)
        if absent := set(recipe.regions).difference(documents["route_label"]):
            raise ValueError(f"no document has the label {min(absent)!r}, so that this region would learn nothing: label "
                             "some (`route_label`), or leave the region out")  # fmt: skip
    routes = make_routes(recipe)
    by = ["route_label"] if recipe.by_document else None  # rows may mix documents of one label
    rows = pack(
        select_arm(documents, recipe.arm, method_routes(recipe)), tokenizer, length=recipe.length, by=by, seed=args.seed
    )
    trainer = RoutedTrainer(
        model,
        args,
        routes=routes,
        train_dataset=in_order(recipe, args, rows, documents, tokenizer),
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
        if recipe.method == "random":
            silenced = write_placebo(args.output_dir, target, recipe, args.seed)
            summary["losses"] |= {f"ablated_{side}": mean_loss(silenced, ds) for side, ds in held_out.items()}
        else:
            export(args.output_dir, target, keep=experts(recipe), trust_remote_code=recipe.trust_remote_code)
        summary["ablated"] = str(target)
        if recipe.coherence_steps:
            summary["coherence"] = make_coherent(rows, target, recipe.coherence_steps, args)
    run.finish(summary)
    print(json.dumps(summary, indent=2))


# Data


def in_order(
    recipe: Recipe, args: RoutedTrainingArguments, rows: Dataset, documents: Dataset, tokenizer: Tokenizer
) -> Dataset | SelfLabeledRows:
    """Return the rows of this run in training order, with the same number of tokens in every arm."""
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * len(rows) / per_step)
    count = args.max_steps * per_step  # all epochs are in the rows already
    if recipe.arm != "routed":
        return schedule(rows, count, seed=args.seed)
    own = ("threshold", "score_again_at", "robust_share", "overrule", "by_document")
    with_self_labels = recipe.self_labels
    if with_self_labels is None:
        sides = {"forget", "retain", UNLABELED} <= set(rows["route_label"])
        with_self_labels = recipe.method == "sgtm" and not recipe.routes and sides
    if not with_self_labels and (odd := [name for name in own if getattr(recipe, name) != getattr(Recipe, name)]):
        raise ValueError(f"`{odd[0]}` needs `--self_labels true`: add that, or leave it out")
    if with_self_labels:
        if not recipe.overrule and UNLABELED not in rows["route_label"][:]:
            logger.warning("`self_labels` has no effect: every row has a label, and `overrule` is off")
        separator = tokenizer.eos_token_id if recipe.by_document else None
        given = {name: value for name in SETTING_NAMES if (value := getattr(recipe, name)) is not None}
        config = replace(RECOMMENDED, **given)
        return SelfLabeledRows(rows, count, config=config, seed=args.seed, separator=separator)
    run = schedule(
        rows,
        count,
        labeled_first=recipe.labeled_first or 0.0,
        forget_share=recipe.forget_share,
        seed=args.seed,
        first_forget_share=0.5 if recipe.first_forget_share is None else recipe.first_forget_share,
    )
    if not recipe.frequency_weights or recipe.method in PLACEBOS:
        return run
    forget, retain = (
        documents.filter(lambda found, label=label: found == label, input_columns="route_label")
        for label in ("forget", "retain")
    )
    if not len(retain):  # unlabeled text contains forget text
        retain = documents.filter(lambda found: found != "forget", input_columns="route_label")
    knobs = {"bias": recipe.frequency_bias, "retain_count": recipe.frequency_count}
    w = token_frequency_weights(tokenizer, forget["text"], retain_texts=retain["text"], **knobs)
    return add_frequency_weights(run, w, base_weight=method_routes(recipe)["forget"].weight("base"))


# Model and method


def build(recipe: Recipe, args: RoutedTrainingArguments, documents: Dataset) -> tuple[nn.Module, Tokenizer]:
    """Return a model with its regions, and its tokenizer."""
    attention = recipe.attn_implementation
    if attention == "auto":
        attention = "eager" if args.device.type == "cpu" else "sdpa"
    if recipe.model_name_or_path:
        run = open_source(recipe.model_name_or_path)
        kwargs: dict = {"attn_implementation": attention, "trust_remote_code": recipe.trust_remote_code}
        kwargs |= {} if run is None else {"is_trainable": True}
        if args.train_base is None:
            args.train_base = run is not None and bool(run.layout.data["train_base"])
        if args.train_base:
            kwargs["dtype"] = torch.float32  # master weights; `bf16` computes in lower precision
        model, tokenizer = load_source(recipe.model_name_or_path, **kwargs)
    else:
        if "text" not in documents.column_names:
            raise ValueError("`input_ids` are tokens of a model: name it in `model_name_or_path`")
        tokenizer = train_tokenizer(documents["text"], recipe.vocab_size)  # on all text, so that arms are comparable
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            max_position_embeddings=recipe.length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if not getattr(model, "peft_config", None):
        first, *others = recipe.regions or [recipe.region]
        model = get_peft_model(model, recipe.region_config(), adapter_name=first)
        for name in (*others, *experts(recipe)):
            model.add_adapter(name, recipe.region_config())
    return model, tokenizer


def kept_regions(recipe: Recipe, args: RoutedTrainingArguments, model: nn.Module) -> list[str]:
    """Return the regions that belong to the model: all in an arm without routing, otherwise the experts that stay."""
    if recipe.arm == "routed":
        return experts(recipe) or args.kept_regions  # of a run that is continued
    return [name for name in adapter_names(model) if name not in args.base_adapters]


def experts(recipe: Recipe) -> list[str]:
    """Return the regions that stay after ablation: the expert for retain text in DEMix."""
    return ["retain"] if recipe.method == "demix" else []


def make_routes(recipe: Recipe) -> Routes | RegionSchedule:
    """Return the routes or the schedule of the method, or weights of one in an arm without routing."""
    if recipe.arm != "routed":
        return presets.control(list(method_routes(recipe)))
    return recipe.region_schedule() if recipe.method == "access" else method_routes(recipe)


def method_routes(recipe: Recipe) -> dict[str, Route]:
    """Return the routes of the method, whatever the arm."""
    if recipe.routes:
        routes = routes_from_dict(json.loads(recipe.routes) if isinstance(recipe.routes, str) else recipe.routes)
    elif recipe.method in PLACEBOS:
        routes = presets.control()
    elif recipe.method == "access":
        routes = recipe.region_schedule().routes()
    else:
        routes = {"sgtm": presets.sgtm, "era": presets.era, "demix": presets.demix}[recipe.method](recipe.region)
    if recipe.base_weight is not None and recipe.method not in PLACEBOS:
        routes["forget"] = replace(routes["forget"], weights={**routes["forget"].weights, "base": recipe.base_weight})
    return routes


# After training


def write_placebo(src: str, target: Path, recipe: Recipe, seed: int) -> nn.Module:
    """Silence as many random units as the region has in the full model of a run; write it, with a record, and return it."""
    model, tokenizer = open_plain(src, [recipe.region], trust_remote_code=recipe.trust_remote_code)
    assert recipe.size is not None
    silence_random_units(model, recipe.size, seed)
    with atomic_directory(target, fresh=True) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        about = {"source": src, "silenced_units_per_mlp": recipe.size, "seed": seed}
        write_json(aside / PLACEBO, {**about, "sha256": {name: sha256(aside / name) for name in files_in(aside)}})
    return model


def make_coherent(rows: Dataset, src: Path, steps: int, args: RoutedTrainingArguments) -> dict[str, object]:
    """Fine-tune the ablated model of ``src`` briefly on labeled retain rows, into a directory beside it."""
    known = rows.filter(lambda label: label == "retain", input_columns="route_label")
    if not len(known):
        known = rows.filter(lambda label: label != "forget", input_columns="route_label")
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).to(args.device)  # type: ignore[arg-type]
    first = known.select(range(min(MAX_ROWS, len(known)))).with_format("torch")[:]
    found = restore_coherence(model, first["input_ids"], labels=first.get("labels"), steps=steps)
    target = src.with_name(src.name + "-coherent")
    with atomic_directory(target) as aside:
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(src).save_pretrained(aside)
    return {"model": str(target), **asdict(found)}


if __name__ == "__main__":
    run_recipe(main)
