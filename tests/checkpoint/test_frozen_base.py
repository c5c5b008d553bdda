"""The place of a frozen base: its commit among several in the cache, and changes that are noticed before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import logits, lora, without
from families import tiny
from huggingface_hub import constants
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from routed_peft.checkpoint import load_routed, save_routed
from routed_peft.checkpoint.export import ablate
from routed_peft.checkpoint.frozen_base import warn_if_changed

MAIN, OLD, SAME = ("a" * 40, "b" * 40, "c" * 40)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with three commits of one repository, the third with the weights of the first."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--org--base"
    for commit, seed in ((MAIN, 0), (OLD, 1), (SAME, 0)):
        tiny("llama", seed=seed).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    for name, commit in (("main", MAIN), ("old", OLD), ("same", SAME)):
        (repo / "refs" / name).write_text(commit)
    return repo


def routed(**where: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained("org/base", **where), lora(), "forget").eval()


@pytest.mark.parametrize(("asked", "commit"), [(None, MAIN), ("main", MAIN), ("old", OLD), (OLD, OLD)])
def test_the_commit_in_use_is_recorded_and_loaded(cache: Path, tmp_path: Path, asked: str | None, commit: str) -> None:
    model = routed(**({} if asked is None else {"revision": asked}))
    path = save_routed(model, tmp_path / "run")
    base = json.loads((path / "routing.json").read_text())["base"]
    assert (base["id"], base["revision"]) == ("org/base", commit) and not (path / "model.safetensors").exists()
    region = json.loads((path / "forget" / "adapter_config.json").read_text())
    assert (region["base_model_name_or_path"], region["revision"]) == ("org/base", commit)
    for name in ("main", "old"):  # the branches move on; the run does not
        (cache / "refs" / name).write_text(SAME if commit == OLD else OLD)
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(ablate(path, tmp_path / "out"))
    assert torch.equal(logits(plain), without(model, "forget"))


@pytest.mark.parametrize(("asked", "commit"), [("same", SAME), (SAME, SAME), ("main", MAIN)])
def test_a_commit_that_was_named_is_kept_beside_one_of_the_same_weights(
    cache: Path, tmp_path: Path, asked: str, commit: str
) -> None:
    path = save_routed(routed(revision=asked), tmp_path / "run", base_revision=asked)
    assert json.loads((path / "routing.json").read_text())["base"]["revision"] == commit


def test_a_commit_that_is_no_longer_in_the_cache_is_saved_with_the_run(cache: Path, tmp_path: Path) -> None:
    model = routed(revision="old")
    (cache / "snapshots" / OLD).rename(tmp_path / "gone")
    path = save_routed(model, tmp_path / "run")
    assert json.loads((path / "routing.json").read_text())["base"]["id"] is None
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(model))


def edited(base: Any) -> None:
    base.get_input_embeddings().weight.data[1, 2] += 1


def configured(base: Any) -> None:
    base.config.rms_norm_eps = 0.5


CHANGES = {
    "vocabulary": (lambda base: base.resize_token_embeddings(base.config.vocab_size + 1), "`vocab_size` is 64 there and 65"),
    "padded": (lambda base: base.resize_token_embeddings(64, pad_to_multiple_of=48), "`vocab_size` is 64 there and 96"),
    "weight": (edited, "`model.embed_tokens.weight` has other values"),
    "configuration": (configured, "`rms_norm_eps` is"),
    "nothing": (lambda base: None, None),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_told_of_before_training(change: str, tmp_path: Path, caplog: Any) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    alter, said = CHANGES[change]
    alter(base)
    model = get_peft_model(base, lora(), "forget")
    with caplog.at_level(logging.WARNING):
        warn_if_changed(model)
    assert bool(caplog.records) == (said is not None)
    if said:
        assert said in caplog.text and "is saved with the run" in caplog.text and str(tmp_path / "base") in caplog.text


def test_a_new_base_is_not_a_changed_one(caplog: Any) -> None:
    warn_if_changed(get_peft_model(tiny("llama"), lora(), "forget"))
    assert not caplog.records
