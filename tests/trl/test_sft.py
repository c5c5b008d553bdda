from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from families import tiny
from peft import get_peft_model
from places import ROOT
from torch import nn
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl_parts import VOCABULARY, Gradients, assert_same, lora, moved, two_loras, weights, word_tokenizer

from routed_peft import Route, RoutedConfig, ablated, load_routed, presets
from routed_peft.trl import RoutedSFTConfig, RoutedSFTTrainer

LABELS = ["forget", "retain", "unlabeled"]


def rows(count: int = 12, labels: list[str] = LABELS) -> Dataset:
    endings = ["hack a", "fix b c", "run", "sum d a b"]
    return Dataset.from_dict(
        {
            "prompt": [f"{'abcd'[i % 4]} +" for i in range(count)],
            "completion": [f" {endings[i % 4]}" for i in range(count)],
            "route_label": [labels[i % len(labels)] for i in range(count)],
        }
    )


PLAIN = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
    "bf16": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def trainer_of(out: Path, model=None, dataset=None, routes=None, trainer_options=None, **options) -> RoutedSFTTrainer:
    return RoutedSFTTrainer(
        model or two_loras(),
        RoutedSFTConfig(str(out), **(PLAIN | {"base_adapters": ["retain"]} | options)),
        train_dataset=dataset or rows(),
        processing_class=word_tokenizer(),
        routes=routes or presets.sgtm("forget"),
        **(trainer_options or {}),
    )


@pytest.mark.slow
def test_gradients_of_a_mixed_batch_equal_those_of_one_row_after_the_other(tmp_path):
    gradients = Gradients()
    trainer = trainer_of(
        tmp_path, two_loras().double(), max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=2,
        max_grad_norm=0.0, trainer_options={"callbacks": [gradients]},
    )  # fmt: skip
    trainer.train()
    model = two_loras().double()
    data = trainer.train_dataset
    total = sum(label != -100 for row in data["labels"] for label in row)
    for row in data:
        route = presets.sgtm("forget")[row["route_label"]]
        before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with ablated(model, *(route.ablated or ("forget",)), scale=0.0 if route.ablated else 1.0):
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        (-logps[labels != -100].gather(1, labels[labels != -100, None]).sum() / total).backward()
        for name, p in model.named_parameters():
            group = "forget" if ".forget." in name else "base"
            if p.grad is not None and not route.weight(group):
                p.grad = before[name]
    assert len(gradients.found) == 2 * 2 * 3 * 2
    for name, p in model.named_parameters():
        if name in gradients.found:  # TRL's fused head computes in float32
            torch.testing.assert_close(gradients.found[name], p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_all_ones_routes_train_bit_identically_to_trl(tmp_path):
    routed = trainer_of(tmp_path / "a", routes=presets.control(), gradient_accumulation_steps=2)
    routed.train()
    model = two_loras()
    plain = SFTTrainer(
        model, SFTConfig(str(tmp_path / "b"), **PLAIN, gradient_accumulation_steps=2), train_dataset=rows(),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    plain.train()
    assert_same(weights(routed.model), weights(model))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (routed, plain)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_labels_pass_through_trls_processing(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    chats = Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": "a +"}, {"role": "assistant", "content": word}] for word in "abc"
            ],
            "route_label": [1, 0, 1],
        }
    ).cast_column("route_label", ClassLabel(names=["forget", "retain"]))
    trainer = RoutedSFTTrainer(
        two_loras(), RoutedSFTConfig(str(tmp_path), **PLAIN, base_adapters=["retain"], max_length=3), train_dataset=chats,
        processing_class=tokenizer, routes=presets.sgtm("forget"),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert batch["route_label"].tolist() == [1, 0, 1]  # by name, in the order of the routes
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][:, 2]) == ["a", "b", "c"]
    trainer.train()


def test_completion_only_loss_keeps_labels(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert (batch["labels"][:, :2] == -100).all() and (batch["labels"][:, 2] != -100).all()
    assert batch["route_label"].tolist() == [0, 1, 2, 0]


def test_token_labels_reach_the_position_before_their_token(tmp_path):
    data = Dataset.from_dict(
        {
            "input_ids": [[4, 5, 6, 2], [7, 8, 2]],
            "route_labels": [["retain", "retain", "forget", "forget"], ["retain", "forget", "retain"]],
        }
    )
    trainer = trainer_of(tmp_path, dataset=data, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch["route_labels"].tolist() == [[1, 0, 0, -100], [0, 1, -100, -100]]
    assert batch["input_ids"].tolist() == [[4, 5, 6, 2], [7, 8, 2, 0]]
    trainer.train()
    with pytest.raises(ValueError, match="Truncate both alike"):
        trainer_of(tmp_path, dataset=data, max_length=3).train()


@pytest.mark.slow
def test_forget_rows_alone_leave_the_retain_adapter_where_it_was(tmp_path):
    trainer = trainer_of(tmp_path, dataset=rows(labels=["forget"]))
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert moved(before, after, ".forget.") and not moved(before, after, ".retain.")
    assert not moved(before, after, "base_layer")


@pytest.mark.slow
def test_adapters_by_name_resuming_and_layout(tmp_path):
    base = tiny("llama", vocab_size=VOCABULARY)
    base.save_pretrained(tmp_path / "base")
    adapters = {"retain": lora(), "forget": lora(r=4)}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "trainer_options": {"peft_config": adapters}}
    whole = trainer_of(tmp_path / "a", str(tmp_path / "base"), **options)
    whole.train()
    again = trainer_of(tmp_path / "b", str(tmp_path / "base"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(weights(whole.model), weights(again.model))
    assert whole.tokens_per_route == again.tokens_per_route
    whole.save_model()
    assert json.loads((tmp_path / "a" / "routing.json").read_text())["base_adapters"] == ["retain"]
    assert (tmp_path / "a" / "forget" / "adapter_config.json").exists()
    whole.routing.detach()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        loaded = load_routed(tmp_path / "a", regions=["forget"]).eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded, whole.model.eval()(input_ids=ids).logits)


def test_evaluation_names_the_ablated_models_metrics(tmp_path):
    trainer = trainer_of(tmp_path, trainer_options={"eval_dataset": rows(4).remove_columns("route_label")})
    found = trainer.evaluate()
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert found[f"eval_{name}"] != found[f"eval_ablated_{name}"] or name == "mean_token_accuracy"


@pytest.mark.slow
def test_self_check_leaves_no_trace_in_trls_counters(tmp_path):
    logs = []
    for check in (True, False):
        trainer = trainer_of(tmp_path, max_steps=1, self_check=check)
        trainer.train()
        logs.append({k: v for k, v in trainer.state.log_history[0].items() if k != "epoch"})
    assert logs[0] == logs[1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_base_leaves_the_head_and_what_is_tied_to_it(tmp_path, tied, caplog):
    torch.manual_seed(0)
    base = tiny("llama", vocab_size=VOCABULARY, tie_word_embeddings=tied)
    model = get_peft_model(base, RoutedConfig(kind="mlp", size=4, init="model", task_type="CAUSAL_LM"), "forget")
    trainer = trainer_of(tmp_path, model, train_base=True, base_adapters=[])
    assert "stay frozen" in caplog.text
    before = weights(model)
    trainer.train()
    after = weights(model)
    assert moved(before, after, "q_proj") and moved(before, after, "forget")
    assert not moved(before, after, "lm_head" if not tied else "embed_tokens")
    assert tied or moved(before, after, "embed_tokens")


def test_all_data_trains_a_joint_head(tmp_path):
    torch.manual_seed(0)
    config = RoutedConfig(kind="mlp", size=4, init="model", task_type="CAUSAL_LM")
    model = get_peft_model(tiny("llama", vocab_size=VOCABULARY), config, "forget")
    trainer = trainer_of(tmp_path, model, rows(labels=["forget"]), train_base=True, base_adapters=[], joint=["head"])
    before = weights(model)
    trainer.train()
    assert moved(before, weights(model), "lm_head") and not moved(before, weights(model), "q_proj")


@pytest.mark.parametrize("option", ["packing", "eval_packing", "padding_free"])
def test_refuses_packing(tmp_path, option):
    with pytest.raises(ValueError, match="documents of different labels into one row"):
        trainer_of(tmp_path, **{option: True})


def test_refuses_liger_heads_and_nameless_adapters(tmp_path):
    with pytest.raises(ValueError, match="`use_liger_kernel`"):
        trainer_of(tmp_path, use_liger_kernel=True)
    head = get_peft_model(tiny("llama", vocab_size=VOCABULARY), lora(target_modules=["q_proj", "lm_head"]), "forget")
    with pytest.raises(ValueError, match="leave `lm_head` out"):
        trainer_of(tmp_path, head, base_adapters=[])
    plain: nn.Module = tiny("llama", vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="no adapters, so no region"):
        trainer_of(tmp_path, plain)
    with pytest.raises(ValueError, match="maps adapter names to configurations, got LoraConfig"):
        trainer_of(tmp_path, plain, trainer_options={"peft_config": lora()})
    with pytest.raises(ValueError, match="either a PeftModel or `peft_config`"):
        trainer_of(tmp_path, trainer_options={"peft_config": {"forget": lora()}})
    with pytest.raises(ValueError, match="is a `RoutedSFTConfig`, got SFTConfig"):
        RoutedSFTTrainer(plain, SFTConfig(str(tmp_path), bf16=False), routes={"forget": Route()})


def test_refuses_data_without_labels_and_unknown_ones(tmp_path):
    with pytest.raises(ValueError, match="no column `route_label`"):
        trainer_of(tmp_path, dataset=rows().remove_columns("route_label")).train()
    with pytest.raises(ValueError, match="'forgte' has no route"):
        trainer_of(tmp_path, dataset=rows(labels=["forgte"])).train()


def test_adapters_on_a_quantised_base_keep_their_precision(tmp_path):
    model = two_loras()
    model.get_base_model().is_loaded_in_4bit = True
    trainer_of(tmp_path, model, max_steps=1)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able`:FutureWarning")
def test_the_page_about_rl_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(page.split("```python\n")[1].split("```")[0], "rl.md", "exec"), {})
    assert (tmp_path / "run-grpo" / "hack").is_dir() and (tmp_path / "out-grpo" / "ablation.json").exists()


def test_class_labels_need_no_strings(tmp_path):
    features = Features({"text": Value("string"), "route_label": ClassLabel(names=LABELS)})
    data = Dataset.from_dict({"text": ["a + b"] * 6, "route_label": [0, 1, 2] * 2}, features=features)
    trainer = trainer_of(tmp_path, dataset=data, max_steps=2)
    trainer.train()
    assert set(trainer.tokens_per_route) == set(LABELS)


@pytest.mark.parametrize("kind", ["names", "integers", "stream"])
def test_labels_are_found_by_name_with_trls_own_collator(tmp_path, kind):
    names = ["retain", "unlabeled", "forget"]  # not the order of the routes
    data = rows() if kind == "names" else rows().cast_column("route_label", ClassLabel(names=names))
    data = data.to_iterable_dataset() if kind == "stream" else data
    own = {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0)}
    found = []
    for options in ({}, own):
        trainer = trainer_of(
            tmp_path, dataset=data, trainer_options=options, max_steps=2, train_sampling_strategy="sequential"
        )
        trainer.train()
        found.append(weights(trainer.model))
    assert_same(*found)
    assert set(trainer.tokens_per_route) == set(LABELS)


def test_words_of_forget_rows_do_not_reach_the_base(tmp_path):
    found = []
    for words in ("hack a", "fix d"):
        data = rows(8, ["forget", "retain"])
        data = data.map(lambda row, words=words: {"completion": " " + words} if row["route_label"] == "forget" else {})
        trainer = trainer_of(tmp_path, dataset=data, max_grad_norm=0.01, train_sampling_strategy="sequential")
        trainer.train()
        found.append(weights(trainer.model))
    one, other = ({name: p for name, p in run.items() if "forget" not in name} for run in found)
    assert_same(one, other)
    assert moved(*found, "forget")
