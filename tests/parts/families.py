"""Tiny random models of every supported family, for the tests of all parts: a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GEMMA = {**_LLAMA, "head_dim": 4, "num_key_value_heads": 1}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "tie_word_embeddings": False},
    "mistral": {**_LLAMA, "tie_word_embeddings": False, "sliding_window": 32},
    "qwen2": {**_LLAMA, "intermediate_size": 28, "tie_word_embeddings": False},
    "qwen3": {**_LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "query_pre_attn_scalar": 4, "sliding_window": 32},
    "gemma3_text": {**_GEMMA, "query_pre_attn_scalar": 4, "sliding_window": 32},
    "olmo2": {**_LLAMA, "tie_word_embeddings": False},
    "phi3": {**_LLAMA, "tie_word_embeddings": False, "original_max_position_embeddings": 64},
    "phi": {**_LLAMA, "tie_word_embeddings": False, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt_neo": {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 28, "max_position_embeddings": 64, "window_size": 32,
        "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0,
    },
    "gpt_neox": {
        "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "rotary_pct": 0.5, **_NO_DROPOUT,
    },
    "falcon": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 28, "bias": True,
        "parallel_attn": True, "new_decoder_architecture": False, "multi_query": True, "max_position_embeddings": 64,
        **_NO_DROPOUT,
    },
}  # fmt: skip

TIED = ("qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "falcon")
"""Families whose tiny model reads its embeddings again as the head."""


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build the tiny model of ``family`` in evaluation mode; ``overrides`` are fields of its configuration.

    The global random state is left as it was.
    """
    config = AutoConfig.for_model(family, **{**_TOKENS, **_CONFIGS[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # norms and biases that are not at their neutral values, so that errors in them show
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {family: partial(tiny, family) for family in _CONFIGS}


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids ``(batch, length)`` without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
