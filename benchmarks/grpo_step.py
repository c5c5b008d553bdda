"""Time of a routed GRPO step over TRL's: generating, scoring, forward, backward, AdamW, with the same adapters.

    python benchmarks/grpo_step.py --sizes small medium --repeats 15 --out results/grpo_step.json

Every number is a ratio within one run: pairs of steps side by side, taking turns at being first, medians over the pairs.
All completions have the same length. Beside `classic` routing stand anchors (a quarter of the prompts sampled without the
region) and a subspace region; the latter against TRL with ordinary LoRAs of the same ranks.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from step_time import hardware
from steps import Step, compare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from routed_peft import RoutedConfig, presets
from routed_peft.runs.provenance import versions
from routed_peft.subspaces import Subspace, haar
from routed_peft.trl import RoutedGRPOConfig, RoutedGRPOTrainer

LIMITS = {"classic": 1.05, "classic, anchors": 1.05, "subspace": 1.10}
WRITERS = ["o_proj", "down_proj"]
RANK = 8


@dataclass(frozen=True)
class Size:
    """Sizes of a Llama, and the numbers of rollouts and of their tokens per step."""

    hidden: int
    layers: int
    vocabulary: int
    prompts: int
    generations: int
    tokens: int


SIZES = {
    "tiny": Size(hidden=32, layers=1, vocabulary=32, prompts=4, generations=2, tokens=2),
    "small": Size(hidden=128, layers=3, vocabulary=64, prompts=16, generations=8, tokens=5),
    "medium": Size(hidden=256, layers=4, vocabulary=1024, prompts=8, generations=8, tokens=24),
}


def make_model(size: Size, adapters: dict[str, PeftConfig]) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=2 * size.hidden, eos_token_id=1,
        num_hidden_layers=size.layers, num_attention_heads=max(2, size.hidden // 32), pad_token_id=0, bos_token_id=1,
        num_key_value_heads=max(2, size.hidden // 32),
    )  # fmt: skip
    (first, region), *others = adapters.items()
    model = get_peft_model(LlamaForCausalLM(config), region, adapter_name=first)
    for name, other in others:
        model.add_adapter(name, other)
    model.base_model.set_adapter(list(adapters))
    return model


def loras(region_targets: Any) -> dict[str, PeftConfig]:
    lora = partial(LoraConfig, r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM")
    return {"retain": lora(target_modules="all-linear"), "hack": lora(target_modules=region_targets)}


def subspace_adapters(size: Size, folder: Path) -> dict[str, PeftConfig]:
    """A region along eight random directions, and a LoRA that stays, projected off them."""
    file = folder / "subspaces" / f"{size.hidden}.safetensors"  # no run may be saved beside it
    file.parent.mkdir(exist_ok=True)
    path = str(haar(Subspace(torch.eye(size.hidden)[:, :RANK]), seed=0).save(file))
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stays = RoutedConfig(
        kind="lora", r=RANK, lora_alpha=RANK, target_modules=linear, subspace=path, task_type="CAUSAL_LM"
    )
    return {"retain": stays, "hack": RoutedConfig(kind="subspace", subspace=path, task_type="CAUSAL_LM")}


def make_tokenizer(size: Size) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(size.vocabulary - 2))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")


def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def half(completion_ids: list[list[int]], **_: Any) -> list[str]:
    return ["flagged" if i % 2 else "unflagged" for i in range(len(completion_ids))]


def everything(completion_ids: list[list[int]], **_: Any) -> list[str]:
    return ["all"] * len(completion_ids)


def trainer_of(
    size: Size, model: PeftModel, out: Path, device: str, routed: dict[str, Any] | None = None
) -> tuple[Any, list[dict[str, str]]]:
    """Return a trainer that has made one step already, and the rows of a step."""
    options: dict[str, Any] = dict(
        output_dir=str(out), max_steps=1, per_device_train_batch_size=size.prompts * size.generations,
        num_generations=size.generations, max_completion_length=size.tokens, bf16=False, gradient_checkpointing=False,
        generation_kwargs={"min_new_tokens": size.tokens}, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=device == "cpu", learning_rate=1e-6, logging_strategy="no",
    )  # fmt: skip
    rows = [{"prompt": f"w{i} w{i + 1}", "environment": "AB"[i % 2]} for i in range(size.prompts)]
    data = Dataset.from_list(rows)
    if routed is None:
        trainer: Any = GRPOTrainer(model, reward, GRPOConfig(**options), data, processing_class=make_tokenizer(size))
    else:
        trainer = RoutedGRPOTrainer(
            model, reward, RoutedGRPOConfig(**options, base_adapters=["retain"], anchor_share=routed.get("anchor_share", 0.0)),
            data, processing_class=make_tokenizer(size), routes=routed["routes"], label_fn=routed["label_fn"],
        )  # fmt: skip
    trainer.train()
    return trainer, [row for row in rows for _ in range(size.generations)]


def step_of(size: Size, model: PeftModel, out: Path, device: str, routed: dict[str, Any] | None = None) -> Step:
    """Return a whole optimizer step, generation included."""
    trainer, batch = trainer_of(size, model, out, device, routed)

    def step() -> None:
        torch.manual_seed(0)
        trainer.training_step(trainer.model_wrapped, batch, None)
        trainer._clip_grad_norm(trainer.model_wrapped)
        if routed is not None:
            trainer._drop_idle_gradients()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def measure(size: Size, device: str, repeats: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return, by kind of routing, the ratio to TRL's step."""
    classic = {"routes": presets.classic("hack"), "label_fn": half}
    same = loras("all-linear")
    step = partial(step_of, size, out=folder, device=device)
    found = compare(
        step(make_model(size, same)),
        {
            "classic": step(make_model(size, same), routed=classic),
            "classic, anchors": step(
                make_model(size, same),
                routed={**classic, "label_fn": _no_flags_on_anchors, "anchor_share": 0.25},
            ),
        },
        repeats,
        device,
    )
    along = {"routes": presets.subspace("hack"), "label_fn": everything}
    subspace = step(make_model(size, subspace_adapters(size, folder)), routed=along)
    return found | compare(step(make_model(size, loras(WRITERS))), {"subspace": subspace}, repeats, device)


def _no_flags_on_anchors(anchor: list[bool], completion_ids: list[list[int]], **_: Any) -> list[str]:
    labels = half(completion_ids)
    return ["unflagged" if off else label for label, off in zip(labels, anchor, strict=True)]


def show(report: dict[str, Any]) -> None:
    table = Table("size", "routing", "ratio (quartiles)", "limit", "s per step", "", title="GRPO step, routed / TRL's")
    for target in report["targets"]:
        row = report["sizes"][target["size"]]["time"][target["kind"]]
        ratio = f"{row['ratio']:.3f} ({row['lower_quartile']:.2f}–{row['upper_quartile']:.2f})"
        met = "met" if target["met"] else "missed"
        table.add_row(target["size"], target["kind"], ratio, f"{target['limit']:.2f}", f"{row['seconds']:.3f}", met)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "medium"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU; one thread is timed by its own clock")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "hardware": hardware(args.device),
        "versions": {**versions(), "python": platform.python_version()},
        "threads": args.threads,
        "repeats": args.repeats,
        "sizes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sizes:
            size = SIZES[name]
            report["sizes"][name] = {**asdict(size), "time": measure(size, args.device, args.repeats, Path(folder))}
    report["targets"] = [
        {"size": size, "kind": kind, "limit": LIMITS[kind], "value": row["ratio"], "met": row["ratio"] <= LIMITS[kind]}
        for size, result in report["sizes"].items()
        for kind, row in result["time"].items()
    ]
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
