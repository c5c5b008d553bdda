"""`TextLoss`: held-out loss of a live model, fast enough for every step of an attack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from routed_peft.data.beginnings import begin_tokens, document_tokens
from routed_peft.data.vocabulary import vocabulary
from routed_peft.eval_mode import evaluating
from routed_peft.losses import target_losses
from routed_peft.routes import IGNORED

_MAX_TOKENS, _MAX_LOGITS = 8192, 2**27  # in a batch: larger ones are no faster, and need more memory


def context_length(model: nn.Module, tokenizer: Any) -> int:
    """Return the context length of a model in tokens, by the rules of lm-eval."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < 10**18 else 2048  # transformers' "not set"


def check_length(model: nn.Module, tokenizer: Any, *, length: int, argument: str = "length") -> None:
    """Raise ValueError if rows of ``length`` tokens exceed the model's context length."""
    if length > (most := context_length(model, tokenizer)):
        got = f"`{argument}` is {length} tokens a row, and the model reads {most} at once"
        raise ValueError(f"{got}: set it to {most} or less")


def first_token(tokenizer: Any) -> int:
    """Return the token to put before every text: the tokenizer's own, or else begin-of-sequence, or end-of-sequence."""
    if begin := begin_tokens(tokenizer):
        return begin[-1]
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ValueError("the tokenizer has neither a begin-of-sequence nor an end-of-sequence token: set "
                         "`tokenizer.eos_token`")  # fmt: skip
    return int(token)


def token_losses(model: nn.Module, input_ids: Tensor, *, attention_mask: Tensor, targets: Tensor) -> Tensor:
    r"""Return :math:`-\log p` of every target, in nats, shaped like the targets; 0 where these are -100.

    All tensors are ``(B, T)``; ``targets`` are the tokens that follow each position.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return target_losses(logits, targets)


class Window(NamedTuple):
    """A part of a document, by its index, that fits into the context: tokens to read, and tokens to score, which end it."""

    document: int
    inputs: list[int]
    targets: list[int]


def windows(document: int, tokens: Sequence[int], *, first: int, length: int) -> Iterator[Window]:
    """Cut a document's tokens into windows of ``length``, each token scored once, as lm-eval does.

    The first begins with the token ``first``, the others with the last token of their predecessor; the last is filled on the
    left with tokens that are scored already.

    >>> [(window.inputs, window.targets) for window in windows(0, [1, 2, 3, 4, 5], first=0, length=3)]
    [([0, 1, 2], [1, 2, 3]), ([2, 3, 4], [4, 5])]
    """
    done = min(length, len(tokens))
    yield Window(document, [first, *tokens[: done - 1]], list(tokens[:done]))
    for start in range(done, len(tokens), length):
        end = min(start + length, len(tokens))
        yield Window(document, list(tokens[end - 1 - length : end - 1]), list(tokens[start:end]))


def pad(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, attention mask and targets of rows (inputs, their last targets), padded on the right.

    >>> pad([([5, 6], [7]), ([5], [6])])[2]
    tensor([[-100,    7],
            [   6, -100]])
    """
    longest = max(len(inputs) for inputs, _ in rows)
    ids, mask, targets = (torch.full((len(rows), longest), fill) for fill in (0, 0, IGNORED))
    for row, (inputs, following) in enumerate(rows):
        ids[row, : len(inputs)] = torch.tensor(inputs)
        mask[row, : len(inputs)] = 1
        targets[row, len(inputs) - len(following) : len(inputs)] = torch.tensor(following)
    return ids, mask, targets


class TextLoss:
    r"""Loss of a model on texts, in nats per token: ``token_ce`` of the task ``routed_loss``, without lm-eval.

    .. math:: L = -\frac{\sum_d \sum_i \log p(x_{d,i} \mid x_{d,<i})}{\sum_d n_d}

    over documents d of :math:`n_d` tokens each, cut into `windows`; `first_token` stands before each and is not scored. A text
    without tokens, or a token beyond the model's vocabulary, is a ValueError.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> None:
        rows = document_tokens(tokenizer, texts)
        if not rows or not all(rows):
            raise ValueError(f"a loss needs texts with at least one token each, got {len(rows)} texts")
        first, length = first_token(tokenizer), context_length(model, tokenizer)
        size = vocabulary(model)
        if (largest := max(first, *map(max, rows))) >= size:
            got = f"the tokenizer gives the token {largest}, but the model's vocabulary has {size} entries"
            raise ValueError(f"{got}: take the model's own tokenizer")
        self.counts = torch.tensor([len(row) for row in rows], dtype=torch.float64)
        """Tokens of every document."""
        cut = [part for i, row in enumerate(rows) for part in windows(i, row, first=first, length=length)]
        self._batches = list(_batches(sorted(cut, key=lambda window: len(window.inputs)), size))

    @torch.no_grad()
    def batches(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Run ``model`` and yield, batch by batch, the document of each row, its targets, and their losses in nats.

        The model is in evaluation mode meanwhile, and gets its own mode back.
        """
        device = next(model.parameters()).device
        with evaluating(model):
            for owners, (ids, mask, targets) in self._batches:
                targets = targets.to(device)
                losses = token_losses(model, ids.to(device), attention_mask=mask.to(device), targets=targets)
                yield owners, targets, losses

    def documents(self, model: nn.Module) -> Tensor:
        """Return the summed loss of every document, in nats, in float64 on the CPU."""
        sums = torch.zeros_like(self.counts)
        for owners, _, losses in self.batches(model):
            sums.index_add_(0, owners, losses.cpu().double().sum(1))
        return sums

    def __call__(self, model: nn.Module) -> float:
        """Return the loss of ``model``, in nats per token."""
        return float(self.documents(model).sum() / self.counts.sum())


def _batches(cut: Sequence[Window], size: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Group windows, short ones first, into batches of limited size."""
    most = max(1, min(_MAX_TOKENS, _MAX_LOGITS // size))
    start = 0
    while start < len(cut):
        end = start + 1
        while end < len(cut) and (end + 1 - start) * len(cut[end].inputs) <= most:
            end += 1
        group = cut[start:end]
        yield torch.tensor([w.document for w in group]), pad([(w.inputs, w.targets) for w in group])
        start = end


def check_causal(model: nn.Module) -> None:
    """Raise ValueError unless ``model`` is a causal language model of transformers with trainable weights."""
    name = type(model).__name__
    if isinstance(model, PeftModel):
        remedy = "give `model.merge_and_unload()`, or without its regions `load_routed(run)`"
        raise ValueError(f"`model` has adapters, and an attacker trains plain weights: {remedy}")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` must be a causal language model of transformers, got {name}")
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError(f"the weights of this {name} are quantized, so they cannot be trained: load it unquantized")
    ids = torch.tensor([[0, 1, 0], [0, 1, 1]], device=next(model.parameters()).device) % vocabulary(model)
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        fits = logits.dim() == 3 and logits.shape[:2] == ids.shape and logits.shape[-1] >= vocabulary(model)
    except (AttributeError, ValueError):  # no logits, or more inputs wanted
        fits = False
    if fits and not logits.isfinite().all():
        problem = f"the outputs of this {name} are not finite: its weights are damaged"
        raise ValueError(f"{problem}, so train or load it again")
    near = 1e-5 if fits and logits.dtype in (torch.float32, torch.float64) else 1e-3
    if not fits or not torch.allclose(logits[0, :2], logits[1, :2], rtol=near, atol=near * float(logits.abs().max())):
        got = f"{name} is not: it does not predict the next token"
        raise ValueError(f"`model` must be a causal language model, which {got}")
