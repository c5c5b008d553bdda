"""Coherence steps: short fine-tuning after ablation that restores performance on retain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from routed_peft.eval_mode import evaluating

BATCH = 64
HELD_OUT = 256
MAX_ROWS = BATCH + HELD_OUT
"""Number of rows in use; later ones are ignored."""


@dataclass(frozen=True)
class Coherence:
    """Result of the coherence steps."""

    learning_rate: float  # the best of those tried
    best_step: int  # step of the kept weights; 0 if no step helped
    retain_losses: list[float]  # held-out, in nats per token, before the first step and after every step at that rate


def restore_coherence(
    model: PreTrainedModel,
    rows: Tensor,
    *,
    steps: int,
    learning_rates: Sequence[float] = (5e-5,),
    labels: Tensor | None = None,
) -> Coherence:
    """Fine-tune an ablated model, in place, on 64 retain rows as one batch, and keep the best step on other retain rows.

    From gradient routing, arXiv 2410.04332, appendix on ERA: AdamW with weight decay 0.1. The paper has the rate 5e-5, a tenth
    of that of training, and is usually at its best after a step or two. Each rate is tried from the same start.

    Args:
        rows: ``(N, T)``, token ids of labeled retain text. The first 64, or half of fewer than 128, are trained on; up to 256
            others are held out.
        steps: at each learning rate.
        labels: ``(N, T)``, with -100 where a token has no loss; by default all have one.

    Raises:
        ValueError: without a step, a learning rate, or two rows; and for weights in low precision, in which small steps round
            to nothing.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
    >>> found = restore_coherence(model, torch.arange(32).remainder(16).view(4, 8), steps=3, learning_rates=[1e-2])
    >>> found.best_step, len(found.retain_losses)
    (3, 4)
    """
    if steps < 1 or not learning_rates or len(rows) < 2:
        raise ValueError("restoring coherence needs at least 1 of `steps`, 1 of `learning_rates` and 2 `rows`, got "
                         f"{steps}, {len(learning_rates)} and {len(rows)}")  # fmt: skip
    if narrow := {str(p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}:
        raise ValueError(f"`model` has weights in {narrow.pop()}, in which small steps round to nothing: load it with "
                         "dtype=torch.float32")  # fmt: skip
    both = torch.stack([rows, rows if labels is None else labels], 1)[:MAX_ROWS].to(model.device)
    batch, held_out = both.tensor_split([trained_rows(len(rows))])
    start = kept = _weights(model)
    found: list[Coherence] = []
    with evaluating(model):  # no dropout, as published
        first = lowest = _loss(model, held_out)
        for rate in learning_rates:
            model.load_state_dict(start)
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
            losses = [first]
            for _ in range(steps):
                optimizer.zero_grad()
                model(input_ids=batch[:, 0], labels=batch[:, 1]).loss.backward()
                optimizer.step()
                losses.append(_loss(model, held_out))
                if losses[-1] < lowest:
                    lowest, kept = losses[-1], _weights(model)
            found.append(Coherence(rate, losses.index(min(losses)), losses))
    model.load_state_dict(kept)
    model.zero_grad()
    return min(found, key=lambda tried: min(tried.retain_losses))


def trained_rows(count: int) -> int:
    """Return the number of training rows among ``count``; the others are held out."""
    return min(BATCH, count // 2)


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _loss(model: PreTrainedModel, rows: Tensor) -> float:
    sums = (model(input_ids=p[:, 0], labels=p[:, 1]).loss.item() * len(p) for p in rows.split(BATCH))
    return sum(sums) / len(rows)
