"""Tiny models, tokenizers and files for the evaluation tests, and the loss of a text in plain torch: the oracle."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "cell wall: a rigid layer around a plant cell",
    "a cat",
    "ñandú: un ave que no vuela, y corre mucho por la pampa",
]


def byte_tokenizer(adds_bos=False, vocab_size=300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(seed=0, vocab_size=300, max_length=64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def log_likelihood(model, tokenizer, text):
    """Sum of log p(token | tokens before) over the tokens of `text`, after one begin-of-sequence token."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    logits = model(torch.tensor([[tokenizer.bos_token_id, *tokens]])).logits[0, :-1]
    log_p = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    return log_p.double().sum().item(), len(tokens)


def token_loss(model, tokenizer, texts):
    """Token-weighted loss in nats, and tokens in all."""
    sums, counts = zip(*[log_likelihood(model, tokenizer, text) for text in texts], strict=True)
    return -sum(sums) / sum(counts), sum(counts)
