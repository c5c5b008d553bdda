"""Flags of `routed-peft undo`: what they make of the trainer's arguments and of the record."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from cli_parts import call

command = importlib.import_module("routed_peft.commands.undo")


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """Settings, arguments and directory of every call, which distills nothing."""
    calls: list[Any] = []
    monkeypatch.setattr(command, "_run", lambda *arguments: calls.append(arguments))
    return calls


def called(asked: list[Any], *flags: object) -> Any:
    result = call("undo", "model", "out", "--text", "a.jsonl", "--cpu", *flags)
    assert result.exit_code == 0, result.output
    return asked.pop()


def test_defaults_are_those_that_help_tells(asked):
    settings, args, out = called(asked)
    assert out == Path("out") and settings["source"] == "model" and settings["text"] == ["a.jsonl"]
    assert (args.alpha, args.beta, args.tolerance, args.topk, args.seed) == (0.6, 0.1, 0.05, None, 0)
    assert (args.max_steps, args.learning_rate, args.warmup_steps, args.weight_decay) == (1000, 3e-4, 50, 0.0)
    assert str(args.eval_strategy.value) == "no" and settings["retain"] is None
    assert args.save_steps == 50 and args.save_total_limit == 1 and not args.bf16


def test_every_flag_reaches_arguments_and_record(asked):
    flags = {"alpha": 0.3, "beta": 0.7, "tolerance": 0.2, "steps": 20, "learning_rate": 1e-3, "batch_size": 3, "length": 9,
             "eval_steps": 7, "topk": 5, "seed": 11}  # fmt: skip
    pairs = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    settings, args, _ = called(asked, *pairs, "--retain", "r.jsonl", "--text", "b.jsonl", "--revision", "v1")
    assert (
        settings["text"] == ["a.jsonl", "b.jsonl"] and settings["retain"] == "r.jsonl" and settings["revision"] == "v1"
    )
    assert all(settings[name] == value for name, value in flags.items())
    assert (args.alpha, args.beta, args.tolerance, args.topk, args.seed) == (0.3, 0.7, 0.2, 5, 11)
    assert (args.max_steps, args.learning_rate, args.eval_steps, args.save_steps) == (20, 1e-3, 7, 7)
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == 3
    assert args.warmup_steps == 2 and args.logging_steps == 10 and str(args.eval_strategy.value) == "steps"


def test_a_short_run_is_looked_at_and_saved_at_its_end(asked):
    _, args, _ = called(asked, "--steps", 3, "--retain", "r.jsonl")
    assert args.eval_steps == args.save_steps == args.logging_steps == 3 and args.warmup_steps == 0


@pytest.mark.parametrize(
    "flags", [["--steps", 0], ["--length", 1], ["--topk", 0], ["--batch-size", 0], ["--eval-steps", 0]]
)
def test_numbers_out_of_range_are_refused_before_anything_runs(asked, flags):
    assert call("undo", "model", "out", "--text", "a.jsonl", *flags).exit_code == 2 and not asked
