from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_parts import call

from routed_peft.commands import COMMANDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./no-such-run"], "'./no-such-run' is no directory"),
        (["ablate", "RUN", "RUN"], "is the source itself"),
        (["ablate", "RUN", "OUT", "--keep", "boi"], "'boi'"),
        (["evaluate", "RUN", "--regions", "boi"], "boi"),
        (["evaluate", "RUN", "--metadata", "pair"], "KEY=VALUE"),
        (["evaluate", "RUN", "--metadata", "limit=few"], "`limit` must be a whole number from 1, got 'few'"),
        (["evaluate", "RUN", "--tasks", "routed_retain_mc", "--metadata", "limit=0"], "`limit` must be a whole number"),
        (["inspect", "no-such-org/no-such-model"], "routed-peft: 'no-such-org/no-such-model' is no directory here, so"),
        (["evaluate", "RUN/bio"], "is an adapter without its model: give its run"),
    ],
)
def test_a_users_mistake_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"RUN": str(run), "RUN/bio": str(run / "bio"), "OUT": str(tmp_path / "out")}
    result = call(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("routed-peft:")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_debug_lets_the_error_through(run):
    result = call("--debug", "ablate", run, run)
    assert isinstance(result.exception, ValueError)


def test_a_wrong_option_is_a_usage_error(run):
    assert call("ablate", run).exit_code == 2
    assert call("evaluate", run, "--batch-size", 0).exit_code == 2


def test_tasks_path_holds_the_tasks():
    result = call("tasks-path")
    assert (Path(result.output.strip()) / "routed_forget_loss.yaml").is_file()


COMMAND_NAMES = [command.__name__.replace("_", "-") for command in COMMANDS]


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_help_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output


def test_help_and_inspection_import_nothing_heavy(run):
    """One process answers `--help` of every command, `tasks-path` and `inspect`, and then names what it has imported."""
    lines = [["--help"], *([name, "--help"] for name in COMMAND_NAMES), ["tasks-path"], ["inspect", str(run)]]
    code = f"""
import sys
from routed_peft.cli import app
for line in {lines}:
    app(line, standalone_mode=False)
heavy = ("torch", "transformers", "peft", "accelerate", "datasets", "lm_eval", "trl", "numpy", "pandas", "matplotlib")
print("imported:", [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(lines) - 2 and "Adapters" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_the_installed_command_works_as_a_process():
    command = [sys.executable, "-m", "routed_peft.cli", "inspect", "./no-such-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("routed-peft: './no-such-run' is no directory") and result.stderr.count("\n") == 1
