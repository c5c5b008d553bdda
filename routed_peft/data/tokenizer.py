"""Training of a small tokenizer, for models trained from scratch without downloads."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text; the same texts give the same tokenizer.

    ``vocab_size`` is the maximum number of entries: 256 bytes, ``<pad>``, ``<eos>`` (which also begins a sequence), and merges
    learned from ``texts``. ValueError where bytes and special tokens do not fit.

    >>> tokenizer = train_tokenizer(["one tree, two trees"] * 3, vocab_size=270)
    >>> tokenizer.decode(tokenizer("año")["input_ids"]), tokenizer.pad_token_id, tokenizer.eos_token_id
    ('año', 0, 1)
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"`vocab_size` must be at least {len(alphabet) + 2} (bytes and special tokens), got "
                         f"{vocab_size}")  # fmt: skip
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, bos_token=EOS)
