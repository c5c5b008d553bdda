"""The claim itself, small: a model trained on two languages loses one with its region and keeps the other."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from families import tiny
from peft import get_peft_model
from torch import Tensor

from routed_peft import RoutedConfig, RoutedTrainer, RoutedTrainingArguments, presets
from routed_peft.ablation import ablated
from routed_peft.data import schedule, train_tokenizer
from routed_peft.training import RegionSchedule, SelfLabelConfig, SelfLabeledRows

LENGTH, WORDS, ROWS = 24, 30, 1280


def language(first_token: int, rows: int, seed: int) -> Tensor:
    """Rows of a Markov chain over 30 tokens, each followed by one of three."""
    chain = torch.Generator().manual_seed(first_token)
    follows = torch.randint(WORDS, (WORDS, 3), generator=chain)
    draw = torch.Generator().manual_seed(seed)
    row = torch.randint(WORDS, (rows,), generator=draw)
    out = [row]
    for _ in range(LENGTH - 1):
        row = follows[row, torch.randint(3, (rows,), generator=draw)]
        out.append(row)
    return torch.stack(out, 1) + first_token


def trained(tmp_path, labels: dict[str, list[str]], routes) -> tuple[dict[str, float], dict[str, float]]:
    """Train from scratch; return held-out loss by side, with the region on and ablated."""
    torch.manual_seed(0)
    base = tiny("llama", vocab_size=300, hidden_size=32, intermediate_size=48, initializer_range=0.05)
    model = get_peft_model(base, RoutedConfig(size=32, init="model", task_type="CAUSAL_LM"), adapter_name="forget")
    rows = [
        {"input_ids": ids, "route_label": label}
        for side, start in (("forget", 4), ("retain", 40))
        for ids, label in zip(language(start, ROWS, 1).tolist(), labels[side] * ROWS, strict=False)
    ]
    steps, batch = 200, 32
    data = schedule(Dataset.from_list(rows), steps * batch, labeled_first=0.25, seed=1)
    args = RoutedTrainingArguments(
        str(tmp_path), train_base=True, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-2,
        train_sampling_strategy="sequential", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        warmup_steps=20, seed=1,
    )  # fmt: skip
    tokenizer = train_tokenizer(["a"], vocab_size=258)
    trainer = RoutedTrainer(model, args, routes=routes, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.routing.detach()
    model.eval()

    def losses() -> dict[str, float]:
        with torch.no_grad():
            return {
                side: float(model(input_ids=ids, labels=ids).loss)
                for side, ids in (("forget", language(4, 64, 2)), ("retain", language(40, 64, 2)))
            }

    with ablated(model, "forget"):
        off = losses()
    return losses(), off


@pytest.mark.slow
def test_the_region_takes_the_forget_side_with_it(tmp_path):
    """Half of either side is labeled, and comes first; the other half has to be absorbed."""
    labels = {"forget": ["forget", "unlabeled"], "retain": ["retain", "unlabeled"]}
    on, off = trained(tmp_path, labels, presets.sgtm("forget"))
    _, placebo = trained(tmp_path, labels, presets.control())
    # Three equally likely successors: ln 3 = 1.10 nats is the floor, ln 30 = 3.40 is guessing within the language.
    assert on["forget"] < 1.8 and on["retain"] < 1.8
    assert off["retain"] < 1.8
    assert off["forget"] > 3.4
    assert off["forget"] > placebo["forget"] + 1.0


@pytest.mark.slow
def test_two_regions_find_their_rows_and_each_is_a_key_of_its_own(tmp_path):
    """Half of the rows of three languages are labeled; the regions label the others, and work alone and together."""
    torch.manual_seed(0)
    topics, starts = ["bio", "cyber"], {"bio": 4, "cyber": 40, "retain": 80}
    base = tiny("llama", vocab_size=300, hidden_size=32, intermediate_size=48, initializer_range=0.05)
    part = {"size": 32, "embeddings": "full", "init": "model", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, RoutedConfig(**part), adapter_name="bio")
    model.add_adapter("cyber", RoutedConfig(**part))
    found = [
        {"input_ids": ids, "route_label": label, "side": topic}
        for topic, start in starts.items()
        for ids, label in zip(language(start, ROWS, 1).tolist(), [topic, "unlabeled"] * ROWS, strict=False)
    ]
    steps, batch = 200, 32
    config = SelfLabelConfig(labeled_first=0.25, first_forget_share=0.5, forget_share=0.5)
    data = SelfLabeledRows(Dataset.from_list(found), steps * batch, config=config, seed=1, regions=topics)
    args = RoutedTrainingArguments(
        str(tmp_path), train_base=True, max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-2,
        train_sampling_strategy="sequential", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        warmup_steps=20, seed=1,
    )  # fmt: skip
    tokenizer = train_tokenizer(["a"], vocab_size=258)
    trainer = RoutedTrainer(
        model, args, routes=RegionSchedule(topics, rate=1), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.routing.detach()
    model.base_model.set_adapter(topics)
    model.eval()
    (scoring,) = data.scorings
    right = [data.rows[row]["side"] == label for row, label in zip(scoring["rows"], scoring["labels"], strict=True)]
    assert sum(right) > 0.98 * len(right)

    def losses(*off: str) -> dict[str, float]:
        with torch.no_grad(), ablated(model, *off) if off else nullcontext():
            return {
                topic: float(model(input_ids=ids, labels=ids).loss)
                for topic, ids in ((topic, language(start, 64, 2)) for topic, start in starts.items())
            }

    none, both, bio, cyber = losses(*topics), losses(), losses("cyber"), losses("bio")
    assert max(loss["retain"] for loss in (none, bio, cyber, both)) < 1.8
    assert min(none["bio"], none["cyber"], bio["cyber"], cyber["bio"]) > 3.4
    assert max(bio["bio"], cyber["cyber"], both["bio"], both["cyber"]) < 1.8
