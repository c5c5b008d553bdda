from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_parts import byte_tokenizer, tiny_llama
from families import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from unlearning_parts import FORGET, LENGTH, RETAIN, arguments, learned_model, loss, ragged

from routed_peft.data import train_tokenizer
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.unlearning import (
    DistillationTrainer,
    TeacherCache,
    UndoArguments,
    check_tokenizers,
    save_student,
    undo,
    unlearn,
)
from routed_peft.unlearning.weight_noise import add_noise

MIX = FORGET + RETAIN


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> PreTrainedModel:
    """A model that knew both sides, and from which one was unlearned by maximum entropy."""
    model, _ = unlearn(
        learned_model(), FORGET, retain_rows=RETAIN, args=arguments(tmp_path_factory.mktemp("unlearn"), "maxent")
    )
    return model


def options(out: Path, **more: Any) -> UndoArguments:
    defaults: dict[str, Any] = {
        "max_steps": 300, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "learning_rate": 6e-3,
        "lr_scheduler_type": "constant", "eval_strategy": "steps", "eval_steps": 10, "tolerance": 0.5, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    return UndoArguments(str(out), **{**defaults, **more})


def parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Stop(TrainerCallback):
    """Interrupts training as a kill would: without a word to anyone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_the_student_becomes_as_good_as_its_teacher_and_never_knew(teacher, tmp_path):
    before = parameters(teacher)
    args = options(tmp_path, alpha=0.6, beta=0.1)
    student, record = undo(teacher, MIX, args=args, retain_rows=RETAIN)
    assert record.stopped and record.steps < record.max_steps and record.steps % 10 == 0
    assert record.student_retain_loss <= 1.5 * record.teacher_retain_loss
    assert loss(student, FORGET) > 0.8 * loss(teacher, FORGET) > 2.0
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters()), "the teacher stays as it is"
    size = matmul_parameters(teacher)
    tokens = record.steps * 16 * LENGTH
    assert record.ledger == TrainingCost(8 * size * tokens, record.steps, tokens, 0)


@pytest.mark.slow
def test_without_noise_the_student_is_there_at_once_and_more_noise_takes_longer(teacher, tmp_path):
    steps = {
        alpha: undo(teacher, MIX, args=options(tmp_path, alpha=alpha), retain_rows=RETAIN)[1].steps
        for alpha in (0.0, 1.0)
    }
    assert steps[0.0] == 10 and steps[1.0] >= 3 * steps[0.0]


@pytest.mark.slow
def test_the_budget_is_the_upper_bound(teacher, tmp_path):
    _, record = undo(
        teacher, MIX, args=options(tmp_path, alpha=1.0, beta=1.0, max_steps=4, eval_steps=2), retain_rows=RETAIN
    )
    assert (record.steps, record.stopped) == (4, False)
    assert record.student_retain_loss > 1.5 * record.teacher_retain_loss
    args = options(tmp_path, alpha=0.0, max_steps=3, eval_steps=2, tolerance=9.0)
    _, record = undo(teacher, MIX, args=args, retain_rows=RETAIN)
    assert (record.steps, record.stopped) == (2, True)
    args = options(tmp_path, alpha=0.0, max_steps=3, eval_steps=50, tolerance=9.0)
    _, record = undo(teacher, MIX, args=args, retain_rows=RETAIN)
    assert (record.steps, record.stopped) == (3, True), "nobody looked on the way, and it got there"
    with pytest.raises(ValueError, match="`student` is the teacher itself"):
        undo(teacher, MIX, args=options(tmp_path), student=teacher)
    _, record = undo(teacher, MIX, args=options(tmp_path, max_steps=3, eval_strategy="no"))
    assert (record.steps, record.stopped, record.student_retain_loss) == (3, None, None)


def step_of(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    before = parameters(trainer.model)
    trainer.train()
    return {name: before[name] - parameter for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_exact_however_it_is_split(tmp_path, accumulation):
    """Rows of unequal length: SGD moves the weights by the gradient of the mean divergence over all tokens of the step."""
    teacher, student = (tiny("llama", torch.float64, seed=seed, vocab_size=300) for seed in (0, 1))
    twin, data = copy.deepcopy(student), ragged(6, 0)
    args = options(
        tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, max_steps=1, eval_strategy="no",
        per_device_train_batch_size=6 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    terms = []
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        p, q = (model(ids).logits[0, :-1].log_softmax(-1) for model in (teacher, twin))
        terms.append((p.exp() * (p - q)).sum(-1))
    torch.cat(terms).mean().backward()
    moved = step_of(DistillationTrainer(student, teacher, args=args, rows=data))
    for name, parameter in twin.named_parameters():
        assert torch.allclose(moved[name], parameter.grad, atol=1e-6), name  # Llama's norms compute in float32


@pytest.mark.slow
def test_all_stored_outputs_are_as_good_as_the_teacher(teacher, tmp_path):
    data = ragged(300, 0)  # two files
    model = tiny("llama", vocab_size=300)
    cache = TeacherCache.make(tmp_path / "cache", model, rows=data, k=300, batch_size=7)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2 and len(cache) == 300
    args = options(tmp_path, max_steps=2, eval_strategy="no", optim="sgd", learning_rate=0.1)
    moved = []
    for stored in (None, cache):
        student = tiny("llama", seed=1, vocab_size=300)
        trainer = DistillationTrainer(student, model, args=args, rows=data, cache=stored)
        moved.append(step_of(trainer))
    assert all(torch.allclose(moved[0][name], moved[1][name], atol=1e-6) for name in moved[0])
    assert trainer.ledger.flops == 6 * matmul_parameters(student) * trainer.ledger.tokens


@pytest.mark.slow
def test_a_few_stored_outputs_will_do(teacher, tmp_path):
    student, record = undo(teacher, MIX, args=options(tmp_path, alpha=0.5, topk=8), retain_rows=RETAIN)
    assert record.stopped and loss(student, RETAIN) <= 1.5 * loss(teacher, RETAIN)
    size, stored = matmul_parameters(teacher), len(MIX) * LENGTH
    assert record.ledger.flops == 6 * size * record.ledger.tokens + 2 * size * stored
    again = undo(teacher, MIX, args=options(tmp_path, alpha=0.5, topk=8), retain_rows=RETAIN)
    assert again[1].ledger == record.ledger, "what is stored was paid for"
    assert same(student, again[0])


def test_an_interrupted_cache_goes_on(teacher, tmp_path):
    data = ragged(300, 0)
    model = tiny("llama", vocab_size=300)
    whole = TeacherCache.make(tmp_path, model, rows=data, k=4)
    assert whole.tokens == sum(len(row["input_ids"]) for row in data)
    kept, lost = sorted(tmp_path.glob("*.safetensors"))
    made, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    again = TeacherCache.make(tmp_path, model, rows=data, k=4)
    assert again.tokens == whole.tokens
    assert kept.stat().st_mtime_ns == made and lost.read_bytes() == content
    for other, rows, k, wrong in ((tiny("llama", vocab_size=300, seed=1), data, 4, "teacher"), (model, data, 5, "k"),
                                  (model, ragged(300, 1), 4, "rows_sha256")):  # fmt: skip
        with pytest.raises(ValueError, match=f"holds outputs with another `{wrong}`"):
            TeacherCache.make(tmp_path, other, rows=rows, k=k)
    with pytest.raises(ValueError, match="`k` must be between 1 and 300"):
        TeacherCache.make(tmp_path / "other", model, rows=data, k=301)


def test_what_a_teacher_says_is_stored_without_its_dropout(tmp_path):
    model = tiny("gpt2", vocab_size=300, resid_pdrop=0.5, embd_pdrop=0.5).train()
    data = ragged(4, 0)
    own, other = (
        TeacherCache.make(tmp_path / "a", model, rows=data, k=4),
        TeacherCache.make(tmp_path / "b", model.eval(), rows=data, k=4),
    )
    assert all(torch.equal(a, b) for i in range(4) for a, b in zip(own[i], other[i], strict=True))


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(teacher, tmp_path):
    more = {"max_steps": 8, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 3, "topk": 8}
    whole, record = undo(teacher, MIX, args=options(tmp_path / "whole", **more))
    with pytest.raises(KeyboardInterrupt):
        undo(teacher, MIX, args=options(tmp_path / "killed", **more), callbacks=[Stop(5)])
    more["resume_from_checkpoint"] = str(tmp_path / "killed/checkpoint-3")
    resumed, again = undo(teacher, MIX, args=options(tmp_path / "killed", **more))
    assert same(whole, resumed) and again.ledger == record.ledger


@pytest.mark.parametrize("name", ["unlearning.json", "summary.json"])
def test_the_output_is_a_plain_checkpoint_with_its_record(teacher, tmp_path, name):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    former = TrainingCost(flops=5, serial_steps=1, tokens=7, labeled_forget_tokens=3)
    (source / name).write_text(json.dumps({"ledger": former.to_dict()}))
    student, record = undo(teacher, MIX, args=options(tmp_path, max_steps=1, seed=4, eval_steps=1), retain_rows=RETAIN)
    content = save_student(student, record, out=out, source=str(source), tokenizer=byte_tokenizer())
    assert content == json.loads((out / "undo.json").read_text())
    assert (content["alpha"], content["beta"], content["seed"], content["steps"]) == (0.6, 0.1, 4, 1)
    assert TrainingCost.from_dict(content["ledger"]) + former == TrainingCost.from_dict(content["total_ledger"])
    again = save_student(student, record, out=tmp_path / "again", source=str(out))
    assert again["teacher_ledger"] is None, "`undo.json` is not read; a run of `recipes/undo.py` has a summary too:"
    (out / "summary.json").write_text(json.dumps(content))
    again = save_student(student, record, out=tmp_path / "again", source=str(out))
    assert again["teacher_ledger"] == content["total_ledger"], "all stages, not the last one"
    (out / "summary.json").write_text(json.dumps(content | {"total_ledger": None}))
    assert save_student(student, record, out=tmp_path / "again", source=str(out))["total_ledger"] is None
    assert same(AutoModelForCausalLM.from_pretrained(out), student)
    assert (out / "tokenizer.json").is_file()


def test_an_adapted_teacher_gives_a_plain_student(teacher, tmp_path):
    adapted = get_peft_model(copy.deepcopy(teacher), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    student, _ = undo(
        adapted, MIX, args=options(tmp_path, alpha=0.0, max_steps=1, learning_rate=0.0, eval_strategy="no")
    )
    assert type(student) is type(teacher) and same(student, merged)
    assert "lora_A" in "".join(name for name, _ in adapted.named_parameters()), "the teacher still has its adapter"


def test_another_student_may_be_trained(teacher, tmp_path):
    """Any model over the same vocabulary, here a narrower one."""
    small = tiny("gpt2")
    student, record = undo(teacher, MIX, args=options(tmp_path, max_steps=2, eval_strategy="no"), student=small)
    assert student is small
    assert record.ledger.flops == (6 * matmul_parameters(small) + 2 * matmul_parameters(teacher)) * record.ledger.tokens


def test_mistakes_are_explained(teacher, tmp_path):
    args = options(tmp_path, max_steps=1)
    for name in ("alpha", "beta"):
        for value in (-0.1, 1.1):
            with pytest.raises(ValueError, match=f"`{name}` must be between 0 and 1"):
                options(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="`rows` is empty"):
        undo(teacher, [], args=args)
    with pytest.raises(ValueError, match="`retain_rows` is empty"):
        undo(teacher, MIX, args=args, retain_rows=[])
    with pytest.raises(ValueError, match="`retain_rows` decide when to stop, but are never evaluated"):
        undo(teacher, MIX, args=options(tmp_path, eval_strategy="no"), retain_rows=RETAIN)
    with pytest.raises(ValueError, match="`teacher_cache` needs `topk`"):
        options(tmp_path, teacher_cache=str(tmp_path))
    with pytest.raises(ValueError, match="vocabulary has 64 entries and the student's 300"):
        undo(teacher, MIX, args=args, student=tiny_llama())
    with pytest.raises(ValueError, match="the token 64, but the model's vocabulary ends at 63"):
        undo(teacher, [{"input_ids": [64, 3]}], args=args)
    with pytest.raises(ValueError, match="different tokenizers: .* 'cell' .*missing|different tokenizers"):
        check_tokenizers(byte_tokenizer(), train_tokenizer(["some text"], vocab_size=270))
    check_tokenizers(byte_tokenizer(), byte_tokenizer())
    with pytest.raises(ValueError, match="`teacher` must be a transformers model"):
        undo(torch.nn.Linear(2, 2), MIX, args=args)


def test_the_noise_of_a_run_is_that_of_its_own_settings(tmp_path):
    """Amount, scale and seed reach the weights, and the record tells them."""
    model = tiny("llama")
    for changes in ({"seed": 3, "alpha": 0.2, "beta": 0.7}, {}):
        args = options(tmp_path, **{"max_steps": 1, "learning_rate": 0.0, "eval_strategy": "no", **changes})
        expected = copy.deepcopy(model)
        add_noise(expected, args.alpha, beta=args.beta, seed=changes.get("seed", 42))
        student, record = undo(model, MIX[:2], args=args)
        assert same(student, expected)
        assert (record.alpha, record.beta, record.seed) == (args.alpha, args.beta, changes.get("seed", 42))
    default = copy.deepcopy(model)
    add_noise(default, 0.6, beta=0.1)
    assert not same(default, expected), "another seed, another noise"
