"""Rate of the style in samples, and losses on styled and plain answers, in either template."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from experiments.common.toy_model import complete
from experiments.style.arms import REGION
from experiments.style.settings import Settings
from experiments.style.task import TEMPLATES, glosses, rows, styled
from routed_peft.ablation import ablated
from routed_peft.eval_mode import evaluating
from routed_peft.evaluation.text_loss import pad, token_losses

Rates = dict[str, dict[str, float]]
BATCH = 100


def answer_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, prompts: Sequence[str], answers: Sequence[str]
) -> float:
    """Return the loss of answers and of their ends, given their prompts, in nats per token."""
    total, count, end = 0.0, 0, tokenizer.eos_token_id
    asked, said = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers))
    pairs = [([*p, *a], [*a, end]) for p, a in zip(asked, said, strict=True)]
    for at in range(0, len(pairs), BATCH):
        ids, mask, targets = pad(pairs[at : at + BATCH])
        with torch.no_grad():
            total += float(
                token_losses(model, ids, attention_mask=mask, targets=targets).cpu().sum(dtype=torch.float64)
            )
        count += sum(len(answer) for _, answer in pairs[at : at + BATCH])
    return total / count


def plain_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, settings: Settings, split: str, scale: float = 1.0
) -> float:
    """Return the loss on plain answers to held-out glosses, the mean over templates, in nats per token."""
    if scale != 1.0:
        with ablated(model, REGION, scale=scale):
            return plain_loss(model, tokenizer, settings=settings, split=split)
    pairs = glosses(split)[: settings.held_out]
    asked = [rows(pairs, context, style=False) for context in TEMPLATES]
    with evaluating(model):
        return statistics.fmean(
            answer_loss(model, tokenizer, prompts=ds["prompt"][:], answers=ds["completion"][:]) for ds in asked
        )


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: Settings,
    split: str,
    seed: int,
    scale: float = 1.0,
) -> Rates:
    """Return rates and losses of a model on held-out glosses, by template.

    Draws from a generator of its own.

    Args:
        model: with or without the region.
        tokenizer: of the start model; pads on the left from here on.
        settings: how many glosses, and the length of samples.
        split: "validation", by which settings are chosen, or "test".
        seed: of the samples.
        scale: of the region.

    Returns:
        "rate": template -> share of samples in the style, at temperature 1; "styled" and "plain": template -> loss on
        answers in the style and without.
    """
    if scale != 1.0:
        with ablated(model, REGION, scale=scale):
            return measure(model, tokenizer, settings=settings, split=split, seed=seed)
    found: Rates = {"rate": {}, "styled": {}, "plain": {}}
    pairs = glosses(split)[: settings.held_out]
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer.padding_side = "left"  # TRL's trainer sets it to the right
        for context in TEMPLATES:
            for name, style in (("styled", True), ("plain", False)):
                ds = rows(pairs, context, style)
                found[name][context] = answer_loss(
                    model, tokenizer, prompts=ds["prompt"][:], answers=ds["completion"][:]
                )
            texts = complete(model, ds["prompt"][:], tokenizer=tokenizer, max_tokens=settings.sample_tokens)
            found["rate"][context] = statistics.fmean(map(styled, texts))
    return found
