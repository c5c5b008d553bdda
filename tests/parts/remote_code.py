"""A checkpoint whose model's code comes with it, as of a repository with code of its own."""

from __future__ import annotations

import json
from pathlib import Path

from evaluation_parts import byte_tokenizer
from families import tiny

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""
AUTO_MAP = {
    "AutoConfig": "modeling_strange.StrangeConfig",
    "AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM",
}


def with_own_code(folder: Path) -> Path:
    """Write a tiny model, its code and its tokenizer, and return the directory."""
    tiny("llama", vocab_size=300, tie_word_embeddings=False).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "modeling_strange.py").write_text(CODE)
    return folder
