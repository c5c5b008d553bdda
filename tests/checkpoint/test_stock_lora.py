"""Regions of ``kind="lora"`` as stock LoRAs: what is refused, and a file that PEFT alone reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_parts import config, logits
from families import tiny
from peft import PeftConfig, PeftModel, get_peft_model

from routed_peft.checkpoint import save_routed
from routed_peft.checkpoint.stock_lora import to_stock_lora
from routed_peft.regions import RoutedConfig


def test_the_numbers_stay_and_peft_reads_them(tmp_path: Path) -> None:
    region = RoutedConfig(kind="lora", r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny("llama"), region, "retain").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(logits(model), logits(tiny("llama").eval()))
    run = save_routed(model, tmp_path / "run", train_base=True)
    out = to_stock_lora(run / "retain", tmp_path / "out")
    assert PeftConfig.from_pretrained(str(out)).peft_type == "LORA"
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), out).eval()), logits(model))


def test_what_is_refused(tmp_path: Path) -> None:
    run = save_routed(get_peft_model(tiny("llama"), config("lora"), "forget"), tmp_path / "run", train_base=True)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        to_stock_lora(run, tmp_path / "out")
    with pytest.raises(ValueError, match="is not an empty directory"):
        to_stock_lora(run / "forget", run)
    with pytest.raises(ValueError, match="not one of RoutedConfig"):
        to_stock_lora(run / "forget", tmp_path / "out")
    assert not (tmp_path / "out").exists()
