"""A tiny model with its forget text, and the texts of an attacker."""

from __future__ import annotations

import torch
from evaluation_parts import byte_tokenizer, tiny_llama

from routed_peft.evaluation.relearning import AttackData

FORGET = [
    f"the {part} of a plant cell divides" for part in ("wall", "core", "skin", "sap", "root", "leaf", "stem", "pith")
]
RETAIN = [f"a {animal} sleeps on the mat" for animal in ("cat", "dog", "cow", "hen", "fox", "owl", "bat", "elk")]
DATA = AttackData(
    forget_train=FORGET[:4],
    forget_test=FORGET[4:],
    retain_train=RETAIN[:4],
    retain_test=RETAIN[4:],
    unrelated_train=["1 2 3 4", "5 6 7 8"],
    facts=[f"fact {i} is {i * i}" for i in range(6)],
)


def tokenizer():
    return byte_tokenizer()


def model(dtype=torch.float32, seed=0):
    """Random weights, with logits small enough for training to lower any loss at once."""
    built = tiny_llama(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter *= 0.2
    return built.to(dtype)


def state(victim):
    return {name: tensor.clone() for name, tensor in victim.state_dict().items()}
