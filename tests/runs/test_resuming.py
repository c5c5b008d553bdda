"""Completeness of checkpoints."""

from __future__ import annotations

import shutil

import pytest
from runs_parts import make_checkpoint
from training_parts import assert_same, train, weights

from routed_peft.data import train_tokenizer
from routed_peft.runs.resuming import check_resumable, latest_resumable

STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], vocab_size=258)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A run of six steps with three checkpoints, and its weights at the end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, weights(train(out, tokenizer, **SAVING).model)


@pytest.mark.slow
@pytest.mark.parametrize("lost", STATE)
def test_a_checkpoint_that_lost_its_state_is_refused(whole, tmp_path, tokenizer, lost):
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "checkpoint-4" / lost).unlink()
    (run / "checkpoint-6" / lost).unlink()
    message = rf"checkpoint-6' cannot .* lacks a complete {lost} .* the complete checkpoint '{run / 'checkpoint-2'}'"
    with pytest.raises(ValueError, match=message):
        train(run, tokenizer, resume=str(run / "checkpoint-6"), **SAVING)
    with pytest.raises(ValueError, match=message):
        train(run, tokenizer, resume=True, **SAVING)
    resumed = train(run, tokenizer, resume=str(run / "checkpoint-2"), **SAVING)
    assert_same(weights(resumed.model), whole[1])


def test_weights_alone_are_no_checkpoint(tmp_path, tokenizer):
    train(tmp_path, tokenizer, save_only_model=True, **SAVING)
    message = r"lacks a complete optimizer.pt, scheduler.pt, rng_state.pth .*`save_only_model=True`.*; no earlier one"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tokenizer, resume=True, **SAVING)


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    assert latest_resumable(tmp_path) is None
    for step in (2, 10):
        make_checkpoint(tmp_path / f"checkpoint-{step}", "optimizer.pt", "rng_state.pth")
    assert latest_resumable(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10/trainer_state.json").write_text('{"global_st')
    assert latest_resumable(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_a_full_disk_cut_short_is_noticed(tmp_path, name, share):
    folder = make_checkpoint(tmp_path / "checkpoint-2", "optimizer.pt", "rng_state.pth")
    check_resumable(folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"lacks a complete {name}"):
        check_resumable(folder)
    assert latest_resumable(tmp_path) is None


def test_every_process_needs_its_random_state(tmp_path, caplog):
    two = make_checkpoint(tmp_path / "checkpoint-8", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth")
    for index in (0, 1):
        check_resumable(two, process_index=index, processes=2)
    assert not caplog.records
    for index, processes in ((0, 1), (2, 3)):  # other numbers of processes do resume, and are told
        caplog.clear()
        check_resumable(two, process_index=index, processes=processes)
        assert f"written by 2 processes and is resumed in {processes}" in caplog.text
    (two / "rng_state_1.pth").unlink()
    check_resumable(two, process_index=0, processes=2)
    with pytest.raises(ValueError, match=r"lacks a complete rng_state_1.pth .*no earlier one"):
        check_resumable(two, process_index=1, processes=2)


def test_a_sharded_optimizer_has_other_names(tmp_path):
    for step, name in enumerate(("optimizer.bin", "optimizer_0")):
        check_resumable(make_checkpoint(tmp_path / f"checkpoint-{step}", "rng_state.pth", name), fsdp=True)
    lost = make_checkpoint(tmp_path / "checkpoint-10", "rng_state.pth", "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"lacks a complete optimizer.bin or optimizer_0 .*the complete checkpoint '.*/checkpoint-1'"
    ):
        check_resumable(lost, fsdp=True)
    later = make_checkpoint(tmp_path / "checkpoint-2", "rng_state.pth")
    (tmp_path / "checkpoint-1" / "optimizer_0").unlink()
    with pytest.raises(ValueError, match=r"the complete checkpoint '.*/checkpoint-0'"):
        check_resumable(later, fsdp=True)
