from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from evaluation_parts import TEXTS, byte_tokenizer, log_likelihood, tiny_llama, token_loss, write_jsonl
from families import FAMILIES
from tokenizers import processors

from routed_peft.data import DocumentArguments, evaluation_rows, pack
from routed_peft.evaluation import evaluate
from routed_peft.evaluation.relearning import Attack
from routed_peft.evaluation.relearning.data import training_batches
from routed_peft.evaluation.text_loss import TextLoss, context_length, first_token, token_losses
from routed_peft.unlearning import mean_loss

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


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", [TEXTS[2], "<s>" + TEXTS[0]])
def test_recipes_attacks_and_lm_eval_agree_on_a_text(adds_bos, text, tmp_path):
    """On the same tokens behind the same beginning, all measures are one number."""
    tokenizer, model = byte_tokenizer(adds_bos), tiny_llama(max_length=128).double()
    loss = TextLoss(model, tokenizer, [text])
    expected, tokens = loss(model), int(loss.counts[0])
    file = write_jsonl(tmp_path / "forget.jsonl", [{"text": text}])
    scores = evaluate(model, tokenizer, tasks=["routed_forget_loss"], metadata={"forget_file": file})
    assert scores["routed_forget_loss/token_ce"] == pytest.approx(expected, abs=1e-10)
    ids, mask, targets = next(training_batches(tokenizer, [[text]], attack=Attack("f", length=128), seed=0))
    attacked = token_losses(model, ids, attention_mask=mask, targets=targets)[0, :tokens].mean()
    assert attacked.item() == pytest.approx(expected, abs=1e-10)
    if adds_bos:  # otherwise nothing predicts the first token of a packed row
        args = DocumentArguments(train_file=file, eval_files=[f"forget={file}"], length=tokens + 1)
        held_out = evaluation_rows(args, tokenizer)["forget"]
        assert mean_loss(model, held_out) == pytest.approx(expected, abs=1e-10)
    else:
        row = pack(Dataset.from_dict({"text": [text]}), tokenizer, length=tokens)[0]["input_ids"]
        again = mean_loss(model, [{"input_ids": [tokenizer.bos_token_id, *row]}])
        assert again == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("template", ["<go> $A", "<go> $A </s>"])
def test_a_beginning_that_is_no_begin_of_sequence_token(template, tmp_path):
    tokenizer, model = byte_tokenizer(), tiny_llama(vocab_size=301).double()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<go>"]})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<go>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    file = write_jsonl(tmp_path / "forget.jsonl", [{"text": text} for text in TEXTS])
    scores = evaluate(model, tokenizer, tasks=["routed_forget_loss"], metadata={"forget_file": file})
    assert TextLoss(model, tokenizer, TEXTS)(model) == pytest.approx(scores["routed_forget_loss/token_ce"], abs=1e-10)
    assert first_token(tokenizer) == ids[0][1]


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
    with pytest.raises(ValueError, match="texts must be strings, got 12 of type int"):
        TextLoss(tiny_llama(), tokenizer, ["a", 12])


def test_the_context_is_that_of_lm_eval(tokenizer):
    assert context_length(tiny_llama(max_length=48), tokenizer) == 48
    assert context_length(FAMILIES["gpt2"](), tokenizer) == 64
