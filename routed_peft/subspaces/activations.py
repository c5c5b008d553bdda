"""Activations of the residual stream on texts, and gradients at its writers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase as Tokenizer

from routed_peft.architectures import decoder_layers, find_writers, layer_index
from routed_peft.eval_mode import evaluating

Conversation = tuple[str, str]
Conversations = Sequence[Conversation]
"""Prompts and their responses, in the form that the model reads (chat template applied)."""


@torch.no_grad()
def response_means(
    model: nn.Module, tokenizer: Tokenizer, *, conversations: Conversations, layers: Sequence[int], batch_size: int = 8
) -> dict[int, Tensor]:
    """Return the mean residual stream behind each decoder layer over the tokens of each response: float32 ``(n, d)``."""
    means: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    streams = _residual_streams(model, tokenizer, conversations=conversations, layers=layers, batch_size=batch_size)
    for hidden, mask in streams:
        weights = mask.float().unsqueeze(2)
        for layer, h in hidden.items():
            means[layer].append(((h.float() * weights).sum(1) / weights.sum(1)).cpu())
    return {layer: torch.cat(parts) for layer, parts in means.items()}


@torch.no_grad()
def covariance(
    model: nn.Module, tokenizer: Tokenizer, *, conversations: Conversations, layer: int, batch_size: int = 8
) -> Tensor:
    """Return the uncentered second moment ``(d, d)`` of the residual stream behind ``layer`` over all response tokens."""
    streams = _residual_streams(model, tokenizer, conversations=conversations, layers=[layer], batch_size=batch_size)
    rows = (hidden[layer][mask].cpu().double() for hidden, mask in streams)
    return reduce(torch.add, (h.T @ h for h in rows))


def writer_gradients(
    model: nn.Module, tokenizer: Tokenizer, *, conversations: Conversations, batch_size: int = 8
) -> Iterator[tuple[int, Tensor]]:
    """Yield (layer, gradient ``(N, d)`` by position) of the responses' loss at each residual writer's output."""
    caught: list[tuple[int, Tensor]] = []

    def keep(name: str, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.detach().requires_grad_()  # of a frozen model
        caught.append((cast(int, layer_index(name)), y))
        return y

    with ExitStack() as stack, evaluating(model), torch.enable_grad():
        for name, module in find_writers(model).items():
            stack.callback(module.register_forward_hook(partial(keep, name)).remove)
        for batch, mask in _batches(model, tokenizer, conversations=conversations, batch_size=batch_size):
            caught.clear()
            logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
            losses = nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="none")
            gradients = torch.autograd.grad((losses * mask[:, 1:].flatten()).sum(), [y for _, y in caught])
            yield from ((layer, g.flatten(0, -2).float()) for (layer, _), g in zip(caught, gradients, strict=True))


def _residual_streams(
    model: nn.Module, tokenizer: Tokenizer, *, conversations: Conversations, layers: Sequence[int], batch_size: int
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Yield, by batch, the residual stream behind each layer ``(B, T, d)`` and the mask of response tokens ``(B, T)``."""
    blocks, caught = decoder_layers(model), dict[int, Tensor]()
    if not layers or not set(layers) <= blocks.keys():
        there = f"the decoder layers 0 … {len(blocks) - 1} of this model"
        raise ValueError(f"`layers` must be among {there}, got {list(layers)}")

    def keep(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        caught[layer] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as stack, evaluating(model):
        for layer in layers:
            stack.callback(blocks[layer].register_forward_hook(partial(keep, layer)).remove)
        for batch, mask in _batches(model, tokenizer, conversations=conversations, batch_size=batch_size):
            model(**batch)
            yield dict(caught), mask


def _batches(
    model: nn.Module, tokenizer: Tokenizer, *, conversations: Conversations, batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    if not conversations:
        raise ValueError("no conversations were given: pass (prompt, response) pairs")
    device = next(model.parameters()).device
    for start in range(0, len(conversations), batch_size):
        rows = []
        for i, (prompt, response) in enumerate(conversations[start : start + batch_size], start):
            before = list(tokenizer(prompt)["input_ids"])
            after = list(tokenizer(response, add_special_tokens=False)["input_ids"])
            if not after:
                raise ValueError(f"conversation {i} has an empty response: give each response one token or more")
            marks = [False] * len(before) + [True] * len(after)
            rows.append((torch.tensor(before + after), torch.ones(len(marks), dtype=torch.long), torch.tensor(marks)))
        # padding on the right, to which no token attends
        ids, attention, mask = [pad_sequence(list(x), batch_first=True).to(device) for x in zip(*rows, strict=True)]
        yield {"input_ids": ids, "attention_mask": attention}, mask
