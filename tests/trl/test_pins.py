"""The internals of TRL (and one of transformers) that the routed trainers build on, held to what they were.

Where this fails, another version changed one. Read what became of it beside the reason given here; mend `routed_peft.trl`
if need be, run its tests, and only then write down the new mark, which ``python tests/trl/test_pins.py`` prints.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable

import pytest
import trl.trainer.utils
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration

from routed_peft.trl import SUPPORTED_TRL

UTILS = trl.trainer.utils
PINS: dict[str, tuple[Callable, str, str]] = {}


def mark(function: Callable) -> str:
    """A hash of a function's source without comments, blank lines and indentation."""
    source = inspect.getsource(inspect.unwrap(function))
    lines = [line.strip() for line in source.splitlines()]
    return hashlib.sha256("\n".join(line for line in lines if line and line[0] != "#").encode()).hexdigest()[:12]


def pin(function: Callable, expected: str, reason: str) -> None:
    PINS[function.__qualname__] = (function, expected, reason)


pin(
    GRPOTrainer.__init__,
    "646fc145b9fc",
    "makes a reference only where `args.beta` is set; sets `vllm_generation`",
)
pin(GRPOTrainer.training_step, "ba3a469495fc", "counts `_step` after the pass, and its time")
pin(
    GRPOTrainer._prepare_inputs, "d8617f874014", "generates, shuffles and splits every key, and keeps batches for reuse"
)
pin(
    GRPOTrainer._generate_and_score_completions,
    "8ad618f3882b",
    "groups stand together; asks for old and reference scores",
)
pin(GRPOTrainer._tokenize_prompts, "c5df2fec534b", "prompts as training has them, chat templates included")
pin(
    GRPOTrainer._calculate_rewards,
    "8ffa0c7ca930",
    "returns the rewards of all processes, and is given the rows of this one",
)
pin(GRPOTrainer._generate, "428bb9b5cd77", "one turn of generation for all prompts, unless there are tools")
pin(GRPOTrainer._generate_single_turn, "e36de950c830", "all prompts in one call of `generate`, in their order")
pin(
    GRPOTrainer._get_per_token_logps_and_entropies,
    "ddcb878f6df4",
    "chunks rows in order; the model's forward once per chunk",
)
pin(
    GRPOTrainer._compute_loss,
    "765e782ef258",
    "reads the named keys of a batch only; advantages per rollout or per token",
)
pin(GRPOTrainer.compute_loss, "c8a3316de929", "hands the batch to `_compute_loss`")
pin(GRPOTrainer.prediction_step, "65e5a967927e", "prepares and evaluates a batch; labels play no part")
pin(GRPOTrainer.log, "7c3eb90e1d83", "flushes `_metrics` and prefixes those of evaluation")
pin(SFTTrainer.__init__, "11f6746802fd", "prepares datasets, keeping their columns; patches the fused head in")
pin(
    SFTTrainer.compute_loss,
    "6f040d811203",
    "passes the whole batch to the model; reads the head's weight in the fused head",
)
pin(SFTTrainer.prediction_step, "9f572c9ae458", "evaluates the loss alone where no metrics are asked for")
pin(SFTTrainer._set_signature_columns_if_needed, "4604a7bedcf3", "leaves the columns to be added to")
pin(SFTTrainer._prepare_dataset, "05a4bbd3a711", "maps rows one by one and keeps other columns, unless it packs")
pin(SFTTrainer.log, "76c6db3f9f34", "flushes `_metrics` and prefixes those of evaluation")
pin(UTILS.shuffle_sequence_dict, "88edff67896f", "shuffles tensors and lists alike, along the first axis")
pin(UTILS.split_tensor_dict, "99bca9adc314", "splits tensors and lists alike, along the first axis")
pin(UTILS.add_fused_lm_head, "5f4aa2119cf1", "reads `lm_head.weight` outside the module's forward")
pin(UTILS.create_model_from_path, "a787b7a90ea3", "loads a model by path or id")
pin(UTILS.nanstd, "8e29e1a96dd6", "the spread of rewards, without those missing")
pin(
    VLLMGeneration._iter_named_params,
    "519043b4d966",
    "yields what the engine loads; replaced by folded weights",
)
pin(VLLMGeneration.sync_weights, "34c6c4623d6f", "takes weights from `_iter_named_params` alone")
pin(VLLMGeneration.generate, "48a5f77c578c", "takes whole groups, in order")
pin(Trainer.training_step, "20aeed27666b", "prepares inputs, computes the loss and runs backward, all in one call")


@pytest.mark.parametrize("name", PINS)
def test_internals_are_what_the_trainers_were_written_against(name):
    function, expected, reason = PINS[name]
    assert mark(function) == expected, (
        f"{function.__module__}.{name} is not what it was in TRL {SUPPORTED_TRL}. `routed_peft.trl` relies on this of it: "
        f"{reason}. Read what changed, mend what needs mending, then pin {mark(function)!r}"
    )


if __name__ == "__main__":
    for name, (function, _, _) in PINS.items():
        print(name, mark(function))
