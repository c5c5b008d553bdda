"""A chat template with tokens of its own (TRL's `chat_template_path`), which resizes a frozen base in memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_parts import VOCABULARY, lora, word_tokenizer

from routed_peft import ablate, ablated, load_routed, presets
from routed_peft.trl import RoutedSFTConfig, RoutedSFTTrainer


def test_a_base_that_a_chat_template_resized_is_told_of_and_saved(tmp_path: Path, caplog: Any) -> None:
    source = word_tokenizer()
    source.add_tokens(["<|turn|>", "<|over|>"], special_tokens=True)
    source.chat_template = "{% for m in messages %}<|turn|> {{ m['content'] }} <|over|> {% endfor %}"
    source.save_pretrained(tmp_path / "template")
    tiny("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "base")
    chats = Dataset.from_dict(
        {
            "messages": [[{"role": "user", "content": "a +"}, {"role": "assistant", "content": w}] for w in "abcd"],
            "route_label": ["forget", "retain"] * 2,
        }
    )
    args = RoutedSFTConfig(
        str(tmp_path / "run"), base_adapters=["retain"], chat_template_path=str(tmp_path / "template"), max_steps=1,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = RoutedSFTTrainer(
        str(tmp_path / "base"), args, train_dataset=chats, processing_class=word_tokenizer(),
        routes=presets.sgtm("forget"), peft_config={"retain": lora(), "forget": lora(init_lora_weights=False)},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert f"`vocab_size` is {VOCABULARY} there and 64 in memory" in caplog.text
    trainer.save_model()
    run = tmp_path / "run"
    assert json.loads((run / "routing.json").read_text())["base"]["id"] is None and (run / "model.safetensors").exists()
    trainer.routing.detach()
    model, tokenizer = trainer.model.eval(), AutoTokenizer.from_pretrained(run)
    ids = tokenizer.apply_chat_template(chats[0]["messages"], return_tensors="pt", return_dict=True)["input_ids"]
    assert VOCABULARY + 1 in ids[0].tolist()
    model.base_model.set_adapter(["retain", "forget"])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with ablated(model, "forget"):
            without = model(input_ids=ids).logits
        assert torch.equal(load_routed(run, ["forget"]).eval()(input_ids=ids).logits, whole)
        assert torch.equal(load_routed(run).eval()(input_ids=ids).logits, without)
        plain = AutoModelForCausalLM.from_pretrained(ablate(run, tmp_path / "out"))
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, without)
