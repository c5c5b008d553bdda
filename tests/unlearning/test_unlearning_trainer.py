from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from unlearning_parts import FORGET, LENGTH, RETAIN, arguments, learned_model, loss, ragged, rows

from routed_peft.unlearning import METHODS, PairedRows, UnlearningTrainer, mean_loss, unlearn


@pytest.fixture(scope="module")
def learned() -> PreTrainedModel:
    return learned_model()


OPTIONS: dict[str, dict[str, Any]] = {
    "gradient_ascent": {},
    "graddiff": {},
    "npo": {"beta": 0.1},
    "simnpo": {},
    "maxent": {"retain_loss": "kl"},
    "rmu": {"learning_rate": 1e-2, "alpha": 10.0, "max_steps": 30},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_forget_loss_rises_and_retain_loss_hardly(learned, tmp_path, method):
    model = copy.deepcopy(learned)
    before = loss(model, FORGET), loss(model, RETAIN)
    _, ledger = unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, method, **OPTIONS[method]))
    after = loss(model, FORGET), loss(model, RETAIN)
    assert after[0] > before[0] + 1.0
    assert after[1] < before[1] + (0.5 if method == "gradient_ascent" else 0.1)
    assert ledger.serial_steps and ledger.labeled_forget_tokens == 16 * LENGTH


# Exactness: the loss and step of the trainer against the formulas, row by row


def reference_loss(
    method: str, model: PreTrainedModel, before: PreTrainedModel, pairs: list[Any], **options: Any
) -> Tensor:
    """The loss of one step from the definitions, a row at a time."""
    sides = {side: [torch.tensor([pair[side]["input_ids"]]) for pair in pairs] for side in ("forget", "retain")}

    def outputs(which: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
        run = which(ids, output_hidden_states=True)
        return run.logits[0, :-1].log_softmax(-1), run.hidden_states[2][0, :-1]

    def log_probs(which: PreTrainedModel, ids: Tensor) -> Tensor:
        return outputs(which, ids)[0].gather(1, ids[0, 1:, None])[:, 0]

    forget, retain = [], []
    for ids in sides["forget"]:
        own, hidden = log_probs(model, ids), outputs(model, ids)[1]
        if method in ("gradient_ascent", "graddiff"):
            forget.append(own)
        elif method == "npo":
            ratio = own.sum() - log_probs(before, ids).sum().detach()
            forget.append(-2 / 0.3 * F.logsigmoid(-0.3 * ratio)[None])
        elif method == "simnpo":
            forget.append(-2 / 2.5 * F.logsigmoid(-2.5 * own.mean() - 0.1)[None])
        elif method == "maxent":
            forget.append(-math.log(300) - outputs(model, ids)[0].mean(-1))
        else:
            forget.append(((hidden - options["target"]) ** 2).mean(-1))
    for ids in sides["retain"]:
        if method == "rmu":
            retain.append(((outputs(model, ids)[1] - outputs(before, ids)[1].detach()) ** 2).mean(-1))
        elif options.get("retain_loss") == "kl":
            p = outputs(before, ids)[0].detach()
            retain.append((p.exp() * (p - outputs(model, ids)[0])).sum(-1))
        else:
            retain.append(-log_probs(model, ids))
    alpha = 0.0 if method == "gradient_ascent" else 0.7
    return 1.3 * torch.cat(forget).mean() + alpha * torch.cat(retain).mean()


CASES = [(method, "ce", 4) for method in METHODS] + [
    ("maxent", "kl", 4),
    ("npo", "kl", 4),
    ("npo", "kl", 1),
    ("rmu", "ce", 1),
]


@pytest.mark.parametrize(("method", "retain_loss", "accumulation"), CASES)
def test_a_step_is_exact_however_it_is_split(tmp_path, method, retain_loss, accumulation):
    """Rows of unequal length, in one batch and in four: SGD moves the weights by exactly the gradient of the formula."""
    model = tiny("llama", torch.float64, num_hidden_layers=3, vocab_size=300)
    before = copy.deepcopy(model)
    options = {"beta": 0.3} if method == "npo" else {"margin": 0.1} if method == "simnpo" else {}
    args = arguments(
        tmp_path, method, gamma=1.3, alpha=0.7, max_steps=1, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
        retain_loss=retain_loss, **options,
    )  # fmt: skip
    trainer = UnlearningTrainer(model, args, forget_rows=ragged(5, 0), retain_rows=ragged(7, 1))
    with torch.no_grad():  # away from the reference, where NPO's and KL's terms are special
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
    twin = copy.deepcopy(model)
    pairs = [trainer.train_dataset[i] for i in range(4)]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = [pair if "retain" in pair else {**pair, "retain": pair["forget"]} for pair in pairs]
    target = {"target": trainer._target.double()} if method == "rmu" else {}
    loss = reference_loss(method, twin, before, pairs, retain_loss=retain_loss, **target)
    grads = torch.autograd.grad(loss, [p for p in twin.parameters() if p.requires_grad])
    gradients = dict(zip([name for name, p in twin.named_parameters() if p.requires_grad], grads, strict=True))
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert len(trained) == (2 if method == "rmu" else len(gradients))
    for (name, parameter), start in zip(model.named_parameters(), twin.parameters(), strict=True):
        step = (start - parameter) / 1e-2
        expected = gradients[name] if name in trained else torch.zeros_like(step)
        assert torch.allclose(step, expected, atol=1e-6), name  # Llama's norms compute in float32


def test_only_what_has_a_target_is_forgotten(learned, tmp_path):
    """Rows may say with `labels` that only some of their tokens count: answers, say."""
    pairs = [{**row, "labels": [-100] * 6 + row["input_ids"][6:]} for row in FORGET]
    args = arguments(tmp_path, "graddiff", max_steps=1, per_device_train_batch_size=16)
    trainer = UnlearningTrainer(copy.deepcopy(learned), args, forget_rows=pairs, retain_rows=RETAIN)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    assert trainer.count_units(batch).tolist() == [[16 * 6, 16], [16 * (LENGTH - 1), 16]]


# Runs


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(learned, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "retain_loss": "kl"}
    whole, resumed = copy.deepcopy(learned), copy.deepcopy(learned)
    _, ledger = unlearn(whole, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "npo", **options))
    options["resume_from_checkpoint"] = str(tmp_path / "checkpoint-3")
    _, again = unlearn(resumed, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "npo", **options))
    assert again == ledger
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_that_lost_its_optimizer_is_not_resumed_from(learned, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    unlearn(copy.deepcopy(learned), FORGET, retain_rows=RETAIN, args=arguments(tmp_path, **options))
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    options |= {"max_steps": 3, "resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(ValueError, match=r"lacks a complete optimizer\.pt.*checkpoint-1'"):
        unlearn(copy.deepcopy(learned), FORGET, retain_rows=RETAIN, args=arguments(tmp_path, **options))


@pytest.mark.slow
def test_a_run_is_a_matter_of_its_seed(learned, tmp_path):
    models = [copy.deepcopy(learned) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, max_steps=2, seed=seed))
    weights = [model.lm_head.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_the_ledger_counts_what_was_run(learned, tmp_path):
    size = sum(p.numel() for name, p in learned.named_parameters() if "embed" not in name)
    one_side = 3 * 4 * LENGTH
    for method, options, passes in (
        ("graddiff", {}, 0),
        ("npo", {}, 1),
        ("npo", {"retain_loss": "kl"}, 2),
        ("rmu", {}, 1),
    ):
        args = arguments(tmp_path, method, max_steps=3, **options)
        _, ledger = unlearn(copy.deepcopy(learned), FORGET, retain_rows=RETAIN, args=args)
        assert ledger.flops == 6 * size * 2 * one_side + 2 * size * passes * one_side
        assert (ledger.serial_steps, ledger.tokens, ledger.labeled_forget_tokens) == (3, 2 * one_side, one_side)
    args = arguments(tmp_path, "gradient_ascent", max_steps=9)
    _, ledger = unlearn(copy.deepcopy(learned), FORGET, retain_rows=None, args=args)
    assert ledger.tokens == 9 * 4 * LENGTH
    assert ledger.labeled_forget_tokens == len(FORGET) * LENGTH, "a row that comes again was labeled once"


def test_epochs_are_passes_over_the_forget_rows(learned, tmp_path):
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    assert (
        unlearn(copy.deepcopy(learned), FORGET, retain_rows=RETAIN, args=args)[1].serial_steps == 2 * len(FORGET) // 4
    )
    assert args.max_steps == -1, "arguments can be used again"


def test_evaluation_losses_are_means_over_tokens(learned, tmp_path):
    sides = {"forget": ragged(5, 0), "retain": ragged(7, 1)}
    model = tiny("llama", vocab_size=300)
    args = arguments(tmp_path, max_steps=1, per_device_eval_batch_size=2)
    trainer = UnlearningTrainer(model, args, forget_rows=FORGET, retain_rows=RETAIN, eval_dataset=sides)
    metrics = trainer.evaluate()
    for side, data in sides.items():
        assert metrics[f"eval_{side}_loss"] == pytest.approx(mean_loss(model, data, 3), rel=1e-5)
        totals = [loss(model, [row]) * (len(row["input_ids"]) - 1) for row in data]
        expected = sum(totals) / sum(len(row["input_ids"]) - 1 for row in data)
        assert metrics[f"eval_{side}_loss"] == pytest.approx(expected, rel=1e-5)


def test_sides_take_turns_evenly():
    pairs = PairedRows(rows(4, 20, 3), rows(24, 60, 5), count=30)
    for side, times in (("forget", 10), ("retain", 6)):
        drawn = sorted(pairs.runs[side].order.tolist())
        assert drawn == sorted([*range(30 // times)] * times)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rnu"}, "`method` must be one of"),
        ({"retain_loss": "mse"}, "`retain_loss` must be one of"),
        ({"beta": 0.0}, "`beta` must be a positive number"),
        ({"alpha": -1.0}, "`alpha` must be a positive number"),
        ({"gamma": float("inf")}, "`gamma` must be a positive number"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_wrong_data_and_models(learned, tmp_path):
    args = arguments(tmp_path)
    model = copy.deepcopy(learned)
    for forget, retain, message in (
        ([], RETAIN, "`forget_rows` is empty"),
        (FORGET, None, "`retain_rows` is empty"),
        ([{"text": "a"}], RETAIN, "no `input_ids`"),
        (FORGET, [{"input_ids": [5, 64]}], "`retain_rows` has the token 64, but the model's vocabulary ends at 63"),
    ):
        with pytest.raises(ValueError, match=message):
            unlearn(model, forget, retain_rows=retain, args=args)
    with pytest.raises(ValueError, match="`reference` .* is of another architecture"):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "npo"), reference=tiny("gpt2"))
    with pytest.raises(ValueError, match="`reference` is `model` itself"):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "npo"), reference=model)
    with pytest.raises(ValueError, match="small updates are rounded away"):
        unlearn(copy.deepcopy(learned).bfloat16(), FORGET, retain_rows=RETAIN, args=args)
    with pytest.raises(ValueError, match="no parameter of `model` requires a gradient"):
        unlearn(copy.deepcopy(learned).requires_grad_(False), FORGET, retain_rows=RETAIN, args=args)
    with pytest.raises(ValueError, match="`rmu_layer` is 2, but the model has 3 blocks"):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "rmu", rmu_layer=2))
    with pytest.raises(ValueError, match=r"`rmu_train_layers` is \[2\]"):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "rmu", rmu_train_layers=[2]))


def test_several_gpus_in_one_process_are_refused(learned, tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        unlearn(copy.deepcopy(learned), FORGET, retain_rows=RETAIN, args=args)


def test_a_loss_that_is_no_number_ends_the_run(learned, tmp_path):
    model = copy.deepcopy(learned)
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path))


def test_a_reference_and_a_model_come_back_as_they_went_in(learned, tmp_path):
    """Neither computes in bfloat16 afterwards, and no failure leaves parts of the model frozen."""
    model, reference = copy.deepcopy(learned), copy.deepcopy(learned)
    unlearn(
        model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "npo", max_steps=1, bf16=True), reference=reference
    )
    ids = torch.tensor([FORGET[0]["input_ids"]])
    assert reference(input_ids=ids).logits.dtype == model(input_ids=ids).logits.dtype == torch.float32
    assert "_original_forward" not in {*vars(reference), *vars(model)}
    with pytest.raises(ValueError, match="`reference` is `model` itself"):
        unlearn(model, FORGET, retain_rows=RETAIN, args=arguments(tmp_path, "rmu", rmu_layer=1), reference=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_without_targets_teach_nothing(learned, tmp_path):
    model = copy.deepcopy(learned)
    silent = [{**row, "labels": [-100] * LENGTH} for row in FORGET]
    unlearn(
        model,
        silent,
        retain_rows=[{**row, "labels": [-100] * LENGTH} for row in RETAIN],
        args=arguments(tmp_path, max_steps=1),
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), learned.parameters(), strict=True))


def test_a_checkpoint_of_another_architecture_is_not_resumed_from(learned, tmp_path):
    unlearn(
        tiny("llama"),
        FORGET,
        retain_rows=RETAIN,
        args=arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
    )
    args = arguments(tmp_path, max_steps=3, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="is a checkpoint of another architecture than LlamaForCausalLM"):
        unlearn(copy.deepcopy(learned), FORGET, retain_rows=RETAIN, args=args)
