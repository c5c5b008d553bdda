"""Conversations with a trait and without, and the slow way to average their activations."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ["tree", "stone", "river", "cloud", "grass", "light", "shade", "leaf", "bird", "hill"]


SHOUTED = [(f"Say {w}.", f" {w.upper()}!") for w in WORDS]


SPOKEN = [(f"Say {w}.", f" {w}.") for w in WORDS]


def naive_means(model: Any, tokenizer: Any, conversations: list[tuple[str, str]], layer: int) -> torch.Tensor:
    """Average the output of the layer's own module, one conversation at a time."""
    caught = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, args, h: caught.append(h))
    rows = []
    for prompt, response in conversations:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(response, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([before + after]))
        rows.append(caught.pop()[0, len(before) :].mean(0))
    hook.remove()
    return torch.stack(rows)
