from __future__ import annotations

import pytest
import torch
from evaluation_parts import TEXTS, byte_tokenizer, log_likelihood, tiny_llama, token_loss, write_jsonl
from families import FAMILIES

from routed_peft.evaluation import evaluate
from routed_peft.evaluation.text_loss import TextLoss, context_length

LONG = " ".join(TEXTS * 4)  # several times the context


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_it_is_the_token_ce_of_lm_eval_also_beyond_the_context(tokenizer, tmp_path):
    texts = [*TEXTS, LONG, LONG[7:150]]
    model = tiny_llama(max_length=16).double()
    file = write_jsonl(tmp_path / "forget.jsonl", [{"text": text} for text in texts])
    scores = evaluate(model, tokenizer, tasks=["routed_forget_loss"], metadata={"forget_file": file})
    assert TextLoss(model, tokenizer, texts)(model) == pytest.approx(scores["routed_forget_loss/token_ce"], abs=1e-12)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_padding_changes_nothing(adds_bos):
    tokenizer, model = byte_tokenizer(adds_bos), tiny_llama().double()
    texts = [*TEXTS, "a"]
    loss = TextLoss(model, tokenizer, texts)
    assert loss(model) == pytest.approx(token_loss(model, tokenizer, texts)[0], abs=1e-12)
    for got, count, text in zip(loss.documents(model), loss.counts, texts, strict=True):
        expected, n = log_likelihood(model, tokenizer, text)
        assert (float(got), int(count)) == (pytest.approx(-expected, abs=1e-10), n)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "falcon"])
def test_every_family_is_measured(family, tokenizer):
    model = FAMILIES[family](vocab_size=300, dtype=torch.float64)
    loss = TextLoss(model, tokenizer, TEXTS)(model)
    assert loss == pytest.approx(token_loss(model, tokenizer, TEXTS)[0], abs=1e-9)


def test_it_leaves_the_model_in_its_mode_and_without_gradients(tokenizer):
    model = tiny_llama().train()
    model.model.layers[0].eval()
    TextLoss(model, tokenizer, TEXTS)(model)
    assert model.training and not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the model's vocabulary has 260 entries: take the model's own tokenizer"):
        TextLoss(tiny_llama(vocab_size=260), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="at least one token each"):
        TextLoss(tiny_llama(), tokenizer, ["a", ""])


def test_the_context_is_that_of_lm_eval(tokenizer):
    assert context_length(tiny_llama(max_length=48), tokenizer) == 48
    assert context_length(FAMILIES["gpt2"](), tokenizer) == 64
