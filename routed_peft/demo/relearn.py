"""An attack: how soon does a model come to know the forget side again, from a few documents of it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


def relearn(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    learning_rate: float,
    steps: Sequence[int],
    measure: Callable[[], float],
) -> dict[int, float]:
    """Finetune all parameters of ``model``, in place, on one full batch by AdamW at a constant rate.

    Args:
        model: a causal language model in float32: rounding must not blunt the attack.
        batch: see `attack_batch`.
        learning_rate: of AdamW, without weight decay.
        steps: ascending; when to measure. 0 is before the attack, the last one ends it.
        measure: returns the loss of ``model`` as it then is.

    Returns:
        step -> loss.
    """
    assert list(steps) == sorted(set(steps)), "steps ascend"
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses, done = {}, 0
    for step in steps:
        model.train()
        for _ in range(step - done):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        done = step
        losses[step] = measure()
    return losses


def attack_batch(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> dict[str, Tensor]:
    """Return documents as one padded batch, each between the token that begins and the one that ends a sequence.

    Args:
        tokenizer: has those two and a padding token.
        documents: texts.
        length: tokens a document at most.
    """
    rows = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id][:length] for ids in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def worst_case(curves: Mapping[float, Mapping[int, float]]) -> dict[int, float]:
    """Return, for each step, the lowest loss over the learning rates: the defender does not choose the attacker's.

    >>> worst_case({1e-3: {0: 5.0, 5: 4.0}, 1e-2: {0: 5.0, 5: 4.5}})
    {0: 5.0, 5: 4.0}
    """
    steps = next(iter(curves.values()))
    return {step: min(curve[step] for curve in curves.values()) for step in steps}
