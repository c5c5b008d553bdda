"""Bad inputs of the recipes: each ends in one line that says what is expected, none in a traceback."""

from __future__ import annotations

import json
import os
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import enable_progress_bars
from evaluation_parts import byte_tokenizer, tiny_llama, write_jsonl
from places import ROOT

os.environ.setdefault("CI", "1")  # TRL sends no telemetry then

pytestmark = pytest.mark.slow

WORDS = {"forget": ["cell", "gene", "virus", "enzyme"], "retain": ["table", "chair", "river", "music"]}
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n",
    "cut": b'{"text": "a',
    "list": b"[1, 2]\n",
    "null": b'{"text": null, "side": "forget"}\n',
    "spaces": b'{"text": "  ", "side": "forget"}\n',
    "nested": b'{"text": {"a": 1}, "side": "forget"}\n',
    "mixed": b'{"text": "a", "side": "forget"}\n{"text": 3, "side": "retain"}\n',
    "other": b'{"body": "a", "side": "forget"}\n',
    "bytes": b"\xff\xfe\x00",
    "surrogate": b'{"text": "a \\ud800 b", "side": "forget"}\n{"text": "a", "side": "retain"}\n',
    "deep": b"[" * 3000 + b"\n",
    "unlabeled": b'{"text": "a b c"}\n',
    "typo": b'{"text": "a cell of cells", "route_label": "forgte"}\n{"text": "a cat of cats", "route_label": "retain"}\n',
    "side typo": b'{"text": "a cell of cells", "side": "forgte"}\n{"text": "a cat of cats", "side": "retain"}\n',
    "numbers": b'{"text": "a cell", "route_label": 1}\n{"text": "a cat", "route_label": 0}\n',
    "one side": b'{"text": "a cell of cells and so on", "side": "forget"}\n' * 9,
    "too short": b'{"text": "a", "side": "forget"}\n{"text": "b", "side": "retain"}\n',
    "beyond": b'{"input_ids": [5, 6, 7, 100000, 8, 9], "side": "forget"}\n' * 9
    + b'{"input_ids": [5, 6, 7, 8, 9, 10], "side": "retain"}\n' * 9,
    "negative": b'{"input_ids": [5, 6, -7, 10, 8, 9], "side": "forget"}\n' * 9
    + b'{"input_ids": [5, 6, 7, 8, 9, 10], "side": "retain"}\n' * 9,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    rng = random.Random(0)
    tiny_llama().save_pretrained(folder / "model")
    tiny_llama(vocab_size=260).save_pretrained(folder / "narrow")  # fewer entries than its tokenizer has
    for name in ("model", "narrow"):
        byte_tokenizer().save_pretrained(folder / name)
    spoiled = tiny_llama()
    with torch.no_grad():
        next(spoiled.parameters()).fill_(torch.nan)
    spoiled.save_pretrained(folder / "spoiled")
    byte_tokenizer().save_pretrained(folder / "spoiled")
    rows = [
        {"text": " ".join(rng.choice([*WORDS[side], "the", "of"]) for _ in range(12)), "side": side}
        for _ in range(20) for side in WORDS
    ]  # fmt: skip
    write_jsonl(folder / "train.jsonl", rows)
    for side in WORDS:
        write_jsonl(folder / f"{side}.jsonl", [{"text": f"{' '.join(WORDS[side])} and {i}"} for i in range(4)])
    for name, content in TEXTS.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    (folder / "folder").mkdir()
    prompts = [{"prompt": "a b", "environment": "A", "route_label": "flagged"}] * 4
    write_jsonl(folder / "prompts.jsonl", [*prompts, *({**row, "route_label": "unflagged"} for row in prompts)])
    write_jsonl(folder / "odd prompts.jsonl", [{**row, "route_label": "flaged"} for row in prompts])
    (folder / "mine.py").write_text("def digits(completions, **_):\n    return [0.0] * len(completions)\n")
    (folder / "wrong.py").write_text("def digits(:\n")
    return folder


def command(recipe: str, place: Path, out: Path) -> list[str]:
    """The shortest run of a recipe that works."""
    model = ["--model_name_or_path", f"{place}/model"]
    short = ["--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    short += ["--output_dir", str(out), "--per_device_train_batch_size", "4"]
    sides = ["--eval_files", *(f"{side}={place}/{side}.jsonl" for side in WORDS)]
    train = ["--train_file", f"{place}/train.jsonl", *sides, "--length", "8", "--eval_strategy", "steps"]
    layers = ["--hidden_size", "16", "--intermediate_size", "16", "--num_hidden_layers", "1", "--size", "4"]
    small = [
        "--hidden_size",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--steps",
        "2",
        "--evaluate_every",
        "1",
    ]  # in case that a mistake is let through
    toy = [*small, "--start_steps", "2", "--output_dir", str(out)]
    rl = [*toy, "--start_batch_size", "4", "--prompts", "2", "--generations", "2", "--validation_prompts", "2"]
    cells = ["--seeds", "0", "--documents", "300", "--batch_size", "4", "--length", "32", "--vocab_size", "300"]
    cells += ["--intermediate_size", "16", "--region_size", "8", "--warmup_steps", "1", "--evaluations", "1"]
    cells += ["--validation_rows", "2", "--limit", "4", "--methods", "no_routing", "routed"]
    more = {
        "pretrain": [*train, *short, "--vocab_size", "270", "--train_base", "true", *layers, "--num_attention_heads", "2"],
        "finetune": [*model, *train, *short, "--rank", "2"],
        "unlearn": [*model, *train, *short],
        "undo": [*model, *short, "--text_files", f"{place}/train.jsonl", *sides, "--length", "8", "--eval_strategy", "steps"],
        "grpo": [*model, *short, "--train_file", f"{place}/prompts.jsonl", "--reward_funcs", f"{place}/mine.py:digits",
                 "--rank", "2", "--num_generations", "4", "--max_completion_length", "4"],
        "experiment": [*small[:8], *cells, "--summary_file", str(out / "summary.json"), "--cells_dir", str(out / "cells")],
        "grpo_reward_hack": [*rl, "--arms", "none", "--test_prompts", "2", "--processes", "1"],
        "grpo_persona": [*rl, "--arms", "none", "--test_prompts", "2"],
        "sft_style": [*toy, "--arms", "none", "--start_documents", "200", "--documents", "200", "--held_out", "2",
                      "--batch_size", "4", "--vocab_size", "300"],
    }  # fmt: skip
    return [f"recipes/{recipe}.py", *more[recipe]]


TRAINING = ("pretrain", "finetune", "unlearn")
TRAINERS = (*TRAINING, "undo", "grpo")
TOYS = ("grpo_reward_hack", "grpo_persona", "sft_style")
RECIPES = (*TRAINERS, "experiment", *TOYS)


def told(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a recipe; assert that it ends with code 1 and one line of its own, and return that."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", [*sys.path])
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        finally:
            enable_progress_bars()
    shown = capfd.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith(f"{Path(words[0]).name}: ")]
    assert ended.value.code == 1 and len(lines) == 1, f"{words}: {ended.value!r} {shown[-2000:]}"
    assert "Traceback" not in shown and "unexpected " not in lines[0], f"{words}: {shown[-2000:]}"
    return lines[0]


def each(recipes: tuple[str, ...], *cases: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    for recipe in recipes:
        for case in cases:
            yield recipe, *case


LINES = ["no_such_setting: 1", "seed: many", "seed: [1]", "seed:", "output_dir: {a: 1}", "seed: !!python/object:os.system {}",
         "- 1", "\ud800", "a: &a [*a]", "{", "seed: 1\nseed: 2", "? [1]\n: 2", "\t- a: b"]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_in_yaml(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str) -> None:
    file, words = tmp_path / "config.yaml", command(recipe, place, tmp_path / "out")
    for line in LINES:
        file.write_bytes(line.encode("utf-8", "surrogatepass"))
        told([*words, "--config", str(file)], capfd)
    for wrong in ([str(tmp_path / "nowhere.yaml")], [str(tmp_path)], [], ["\0"]):
        told([*words, "--config", *wrong], capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        *each(
            TRAINERS,
            (["--learning_rate", "nan"],), (["--learning_rate", "inf"],), (["--learning_rate", "-1"],),
            (["--per_device_train_batch_size", "0"],), (["--gradient_accumulation_steps", "0"],),
            (["--model_name_or_path", "./nowhere"],), (["--model_name_or_path", "{place}/folder"],),
            (["--model_name_or_path", "{place}/train.jsonl"],),
            (["--output_dir", "{place}/train.jsonl"],), (["--output_dir", "{place}/train.jsonl/below"],),
            (["--output_dir", ""],), (["--output_dir", "{place}/model"],), (["--resume_from_checkpoint", "nowhere"],),
            (["--seed", "-1"],), (["--seed", str(10**20)],), (["--optim", "none"],), (["--lr_scheduler_type", "none"],),
            (["--bf16", "perhaps"],), (["--logging_steps", "0"],), (["--warmup_steps", "-1"],), (["--max_steps", "x"],),
        ),
        *each(
            TRAINING,
            (["--train_file", "nowhere.jsonl"],), (["--train_file", "{place}/folder"],), (["--forget_file", "x.txt"],),
            (["--eval_files", "forget=nowhere.jsonl"],), (["--eval_files", "{place}/forget.jsonl"],),
            (["--eval_files", "forget={place}/train.jsonl"],),
            (["--eval_files", "a={place}/forget.jsonl", "a={place}/retain.jsonl"],),
            (["--length", "0"],), (["--length", "1"],), (["--length", str(10**9)],), (["--labeled", "2"],),
            (["--recall", "-1"],), (["--precision", "0.5", "--recall", "nan"],), (["--label_seed", "-1"],),
            (["--eval_documents", "0"],), (["--label_keywords", "nothing", "--text_column", "none"],),
            (["--text_template", "no columns"],), (["--text_template", "{{a"],), (["--text_template", "{{a.b}}"],),
            (["--text_template", "{{}}"],), (["--text_template", "{{a!x}}"],), (["--text_template", "{{text:d}}"],),
        ),
        *each(
            ("pretrain",),
            (["--size", "0"],), (["--size", "-4"],), (["--vocab_size", "1"],), (["--hidden_size", "0"],),
            (["--num_attention_heads", "3"],), (["--region", "a/b"],), (["--region", "x" * 300],), (["--region", "none"],),
            (["--routes", "[1]"],), (["--routes", "{{"],), (["--routes", '{{"forget": 1}}'],), (["--base_weight", "nan"],),
            (["--routes", '{{"forgte": {{"weights": {{"base": 0}}}}, "retain": {{}}, "unlabeled": {{}}}}'],),
            (["--routes", '{{"forget": {{"weights": {{"bse": 0}}}}, "retain": {{}}}}'],), (["--coherence_steps", "-1"],),
            (["--attn_implementation", "none"],), (["--ablate_to", "{place}/model"],), (["--forget_share", "1.5"],),
            (["--routes", '{{"forget": {{"weights": {{"base": "0"}}}}, "retain": {{}}}}'],), (["--route_layers", "9"],),
            (["--self_labels", "true", "--threshold", "none"],), (["--frequency_bias", "-1"],),
            (["--max_steps", "-1", "--num_train_epochs", "0"],), (["--self_labels", "true", "--score_again_at", "-1"],),
        ),
        *each(
            ("finetune",),
            (["--rank", "0"],), (["--lora_alpha", "-1"],), (["--target_modules", "nothing"],), (["--method", "none"],),
            (["--attn_implementation", "none"],), (["--labeled_first", "2"],), (["--model_name_or_path", ""],),
        ),
        *each(
            ("unlearn",),
            (["--forget_rows", "0"],), (["--method", "none"],), (["--revision", "x"],),
            (["--method", "rmu", "--rmu_layer", "99"],),
        ),
        *each(
            ("undo",),
            (["--alpha", "2"],), (["--beta", "-1"],), (["--tolerance", "nan"],), (["--topk", "0"],), (["--topk", "1000"],),
            (["--text_files", "nowhere.txt"],), (["--text_files", "{place}/folder"],), (["--student", "./nowhere"],),
            (["--student", "{place}/narrow"],), (["--eval_files", "retian={place}/retain.jsonl"],), (["--length", "0"],),
            (["--eval_files", "retain={place}/train.jsonl"],), (["--model_name_or_path", "{place}/spoiled"],),
        ),
        *each(
            ("grpo",),
            (["--train_file", "nowhere.jsonl"],), (["--train_file", "{place}/train.jsonl"],), (["--reward_funcs", "none"],),
            (["--reward_funcs", "{place}/mine.py:none"],), (["--reward_funcs", "{place}/wrong.py:digits"],),
            (["--reward_funcs", "nowhere.py:digits"],), (["--reward_funcs", "no.such.module"],), (["--reward_funcs", ":"],),
            (["--routes", "[1]"],), (["--routes", "{{"],), (["--environment_labels", "[]"],), (["--environment_labels", "{{"],),
            (["--environment_labels", '{{"A": "flaged"}}'],), (["--monitor", "[1]"],), (["--monitor", '{{"evry": 1}}'],),
            (["--monitor", '{{"every": "x"}}'],), (["--subspace", "nowhere.safetensors", "--method", "subspace"],),
            (["--subspace", "{place}/train.jsonl", "--method", "subspace"],), (["--rank", "0"],), (["--region", "a/b"],),
            (["--num_generations", "3"],), (["--num_generations", "1"],), (["--target_modules", "nothing"],),
            (["--train_file", "{place}/odd prompts.jsonl"],), (["--eval_file", "nowhere.jsonl"],), (["--labeled", "2"],),
            (["--on_halt", "drop"],), (["--max_completion_length", "0"],), (["--temperature", "-1"],),
        ),
        *each(
            ("experiment",),
            (["--methods", "routd"],), (["--methods", "routed:size"],), (["--methods", 'routed:forget_share="x"'],),
            (["--seeds", "x"],), (["--seeds"],), (["--labeled_shares", "2"],), (["--labeled_shares", "nan"],),
            (["--attacks", "x"],),
            (["--attack_steps", "1"],), (["--attack_rates", "-1"],), (["--label_quality", "1"],), (["--label_quality", "2/2"],),
            (["--attack_split", "x"],), (["--summary_file", "{place}/train.jsonl"],), (["--extensions", "-1"],),
            (["--pair", "none"],), (["--steps", "0"],), (["--steps", "-1"],), (["--learning_rate", "nan"],),
            (["--learning_rate", "-1"],), (["--batch_size", "0"],), (["--length", "1"],), (["--documents", "0"],),
            (["--hidden_size", "0"],), (["--heads", "3"],), (["--layers", "-1"],), (["--region_size", "0"],),
            (["--vocab_size", "10"],), (["--evaluations", "-1"],), (["--warmup_steps", "-1"],), (["--limit", "0"],),
            (["--cells_dir", "{place}/train.jsonl"],), (["--validation_rows", "0"],), (["--seeds", "-1"],),
            (["--attack_rates", "nan"],), (["--summary_file", "{place}"],),
        ),
        *each(
            TOYS,
            (["--arms", "nothing"],), (["--seeds", "x"],), (["--steps", "-1"],), (["--steps", "0"],), (["--hidden_size", "0"],),
            (["--layers", "0"],), (["--heads", "0"],), (["--heads", "3"],), (["--learning_rate", "nan"],),
            (["--learning_rate", "-1"],), (["--start_steps", "-1"],), (["--start_learning_rate", "inf"],), (["--rank", "0"],),
            (["--evaluate_every", "0"],), (["--seeds", "-1"],), (["--output_dir", "{place}/train.jsonl"],),
        ),
        *each(
            ("grpo_reward_hack", "grpo_persona"),
            (["--noise", "2"],), (["--clean_share", "-1"],), (["--prompts", "0"],), (["--generations", "0"],),
            (["--test_prompts", "0"],),
        ),
        *each(
            ("grpo_persona",),
            (["--directions", "0"],), (["--contrasts", "0"],), (["--loud_share", "2"],), (["--observe_every", "0"],),
            (["--save_every", "0"],), (["--patience", "0"],), (["--gap_prompts", "0"],), (["--blame", "nan"],),
            (["--region_learning_rate", "-1"],), (["--max_reward_gap", "nan"],), (["--guilty_from", "-1"],),
        ),
        *each(
            ("sft_style",),
            (["--vocab_size", "0"],), (["--start_documents", "0"],), (["--documents", "-1"],), (["--style_share", "nan"],),
            (["--batch_size", "0"],), (["--labeled_first", "2"],), (["--held_out", "0"],), (["--sample_tokens", "0"],),
            (["--split", "train"],), (["--labels", "none"],),
        ),
    ],
)  # fmt: skip
def test_settings(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str, flags: list[str]
) -> None:
    told([*command(recipe, place, tmp_path / "out"), *(flag.format(place=place) for flag in flags)], capfd)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("recipe", [*TRAINING, "undo"])
def test_text_for_training(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str, name: str
) -> None:
    fine = {
        "undo": ["typo", "side typo", "unlabeled", "numbers", "one side", "beyond", "negative"],
        "unlearn": ["one side"],
    }
    argument = "--text_files" if recipe == "undo" else "--train_file"
    if name not in fine.get(recipe, ()):
        told([*command(recipe, place, tmp_path / "out"), argument, f"{place}/{name}.jsonl"], capfd)


@pytest.mark.parametrize(
    "name", ["empty", "cut", "null", "spaces", "mixed", "other", "bytes", "surrogate", "too short"]
)
@pytest.mark.parametrize("recipe", [*TRAINING, "undo"])
def test_text_that_is_held_out(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str, name: str
) -> None:
    told([*command(recipe, place, tmp_path / "out"), "--eval_files", f"retain={place}/{name}.jsonl"], capfd)


@pytest.mark.parametrize("recipe", ["pretrain", *TRAINERS[1:4]])
def test_a_tokenizer_with_more_entries_than_the_model(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str
) -> None:
    words = [*command(recipe, place, tmp_path / "out"), "--model_name_or_path", f"{place}/narrow"]
    assert "take the model's own tokenizer" in told(words, capfd)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_debug_shows_where(place: Path, tmp_path: Path) -> None:
    words = [*command("pretrain", place, tmp_path / "out"), "--train_file", f"{place}/null.jsonl", "--debug"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="non-empty `text`") as raised:
        patch.setattr(sys, "argv", words)
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert len(raised.traceback) > 3
    assert json.loads((place / "train.jsonl").read_text().splitlines()[0])["side"] == "forget"
