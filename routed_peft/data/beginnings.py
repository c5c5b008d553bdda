"""Tokens of documents, each begun as the tokenizer itself begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from routed_peft.data.columns import check_strings


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text by itself, such as Gemma's ``<bos>``; often none."""
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    if plain:
        return full[: next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)]
    return full[:-1] if len(full) > 1 and full[-1] == tokenizer.eos_token_id else full


def document_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text without those of `begin_tokens`, even where the text spells them out."""
    check_strings(texts)
    begin = begin_tokens(tokenizer)
    tokens = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [ids[len(begin) :] if begin and ids[: len(begin)] == begin else ids for ids in tokens]
