"""Tiny models with regions that matter, for tests of ablation, checkpoints and the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from routed_peft.checkpoint import save_routed
from routed_peft.regions import RoutedConfig

KINDS = pytest.mark.parametrize("kind", ["mlp", "lora"])
FAMILIES = ("llama", "gpt2", "qwen3", "phi3")
TARGETS = {
    "gpt2": ["c_attn"],
    "phi3": ["qkv_proj"],
    "gpt_neox": ["query_key_value"],
    "falcon": ["query_key_value"],
}
TINY: dict[str, Any] = {"init_lora_weights": False, "r": 2}


def lora(family: str = "llama", **more: Any) -> LoraConfig:
    more = {"target_modules": TARGETS.get(family, ["q_proj", "v_proj"]), **TINY, **more}
    return LoraConfig(fan_in_fan_out=family == "gpt2", **more)


def config(kind: str, family: str = "llama", size: int = 3) -> Any:
    return RoutedConfig(size=size, init="model") if kind == "mlp" else lora(family)


def wrapped(kind: str, family: str = "llama", names: tuple[str, ...] = ("forget", "bio"), **tiny_: Any) -> PeftModel:
    """A model with regions that all matter."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(family, **tiny_), config(kind, family), names[0])
    for size, name in enumerate(names[1:], 4):
        model.add_adapter(name, config(kind, family, size))
    model.base_model.set_adapter(list(names))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(tokens()).logits


def without(model: PeftModel, *names: str) -> torch.Tensor:
    """Logits with only the other adapters active, by PEFT's own means."""
    active = list(model.base_model.active_adapters)
    rest = [name for name in active if name not in names]
    if not rest:
        with model.disable_adapter():
            return logits(model)
    model.base_model.set_adapter(rest)
    result = logits(model)
    model.base_model.set_adapter(active)
    return result


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frozen(tmp_path: Path, kind: str = "lora", **saved: Any) -> tuple[PeftModel, Path]:
    """A run over a base that was saved before."""
    tiny("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(kind), "retain")
    model.add_adapter("forget", config(kind, size=4))
    model.base_model.set_adapter(["retain", "forget"])
    return model.eval(), save_routed(model, tmp_path / "run", base_adapters=["retain"], **saved)
