"""Padding that rows do not declare, and packed documents: what is certain is masked, and what cannot be known is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from routed_peft.routes import IGNORED

PACKED_COLUMNS = ("position_ids", "seq_lengths", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
"""Columns by which other libraries tell apart the documents packed into one row."""


def check_unpacked(columns: Collection[str]) -> None:
    """Raise ValueError where ``columns`` tell apart documents within a row, which attention here does not."""
    if found := [name for name in PACKED_COLUMNS if name in columns]:
        raise ValueError(f"rows have the column `{found[0]}`, by which attention keeps documents in one row apart; "
                         "that is not supported, and without it a document's loss would train on its neighbors. Give "
                         "one document per row, or pack documents of one label with `routed_peft.data.pack`; if rows "
                         f"are single documents, leave `{found[0]}` out")  # fmt: skip


def check_mask(mask: Sequence[Any]) -> None:
    """Raise ValueError where a row's attention mask is not one 0 or 1 per token."""
    nested = [value for value in mask if hasattr(value, "__len__")]
    if odd := nested[:1] or sorted(set(mask) - {0, 1}):
        raise ValueError(f"`attention_mask` has one 0 or 1 per token, got {odd}, too: documents in one row cannot be "
                         "kept apart by a mask. Give one document per row, or pack documents of one label with "
                         "`routed_peft.data.pack`")  # fmt: skip


def infer_mask(ids: Sequence[int], trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the attention mask of a row that came without one: 0 at the padding tokens with which it begins or ends.

    Where the padding token also ends or begins texts, one of it at either end may be part of the text. More cannot be told
    from padding. ``trained`` says whether each of the row's tokens has a loss; ValueError where padding that cannot be told
    from text would be trained on.
    """
    pad, count = tokenizer.pad_token_id, len(ids)
    if pad is None or not count or pad not in (ids[0], ids[-1]):
        return [1] * count
    left = next((i for i, token in enumerate(ids) if token != pad), count)
    right = next((i for i, token in enumerate(reversed(ids)) if token != pad), count)
    shared = [role for role in ("eos_token", "bos_token", "unk_token") if getattr(tokenizer, f"{role}_id") == pad]
    if not shared:
        return [0 if i < left or i >= count - right else 1 for i in range(count)]
    allowed = max(1, sum(role != "unk_token" for role in shared))  # the end of one text, and the beginning of the next
    for run in (trained[:left], trained[count - right :]):
        if sum(run) > allowed:
            raise ValueError(f"a row without `attention_mask` begins or ends with {len(run)} tokens "
                             f"{tokenizer.pad_token!r}, which are padding and `{shared[0]}` alike, so the model would "
                             "be trained on padding: keep the tokenizer's `attention_mask` in the rows, set `labels` "
                             "to -100 there, or give the tokenizer a `pad_token` of its own")  # fmt: skip
    return [1] * count


def check_batch(batch: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise ValueError on a batch of somebody else's collator that trains on padding, or keeps packed documents apart.

    It has ``input_ids``, ``labels`` and perhaps ``attention_mask`` and ``position_ids``, each ``(B, T)``. The ``tokenizer``
    names the padding token; None, or another processor, where it is not known.
    """
    check_unpacked([name for name in batch if name != "position_ids"])
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if isinstance(mask, Tensor) and (mask.dim() != 2 or bool((mask > 1).any())):
        raise ValueError(f"the collator's `attention_mask` is {tuple(mask.shape)} with values up to {int(mask.max())}, "
                         "expected (B, T) of 0 and 1: documents in one row cannot be kept apart")  # fmt: skip
    if _restarts(batch.get("position_ids"), mask):
        check_unpacked(["position_ids"])
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape or labels.dim() != 2:
        return
    trained = labels != IGNORED
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        padded = (trained & (mask == 0)).any(1)
    elif isinstance(tokenizer, PreTrainedTokenizerBase):
        masks = [infer_mask(*row, tokenizer) for row in zip(ids.tolist(), trained.tolist(), strict=True)]
        padded = (trained & (torch.tensor(masks, device=labels.device) == 0)).any(1)
    else:
        return
    if bool(padded.any()):
        raise ValueError(f"the collator gives padding a loss: `labels` of row {int(padded.nonzero()[0])} are not -100 at its "
                         "padding. Set them to -100 there, or take `RoutedCollator` (the default)")  # fmt: skip


def _restarts(positions: Any, mask: Any) -> bool:
    """Return whether positions within a row begin anew, as those of packed documents do; padding aside."""
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return False
    back = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        back &= (mask[:, 1:] * mask[:, :-1]) > 0
    return bool(back.any())
