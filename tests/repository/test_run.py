from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from places import ROOT

INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


def program(file: Path, lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


def run(tmp_path: Path, system: str, gpu: bool | None, reachable: bool, *arguments: str) -> tuple[list[str], str]:
    """Start a copy of `run` whose python, uname and nvidia-smi are made up; return what python was called with."""
    for name in ("run", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    calls, tools = tmp_path / "calls", tmp_path / "tools"
    python = f'echo "$@" >>{calls}\n[ "$1" != -c ] || exit {int(not reachable)}'
    program(tmp_path / ".venv/bin/python", python)
    program(tools / "uname", f"echo {system}")
    for name in ("sh", "dirname", "cat", "cksum"):
        (tools / name).symlink_to(shutil.which(name))
    if gpu is not None:
        program(tools / "nvidia-smi", f"exit {int(not gpu)}")
    done = subprocess.run(
        ["sh", "run", "test", *arguments], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines(), done.stderr


@pytest.mark.parametrize(
    ("system", "gpu", "reachable", "flag"),
    [
        ("Linux", None, True, True),
        ("Linux", False, True, True),  # a driver without a device
        ("Linux", None, False, False),
        ("Linux", True, True, False),
        ("Darwin", None, True, False),
    ],
)
def test_torch_for_the_cpu_where_there_is_no_gpu(tmp_path, system, gpu, reachable, flag):
    calls, said = run(tmp_path, system, gpu, reachable, "-k", "x")
    (install,) = [call for call in calls if call.startswith("-m pip install")]
    assert install.endswith(f"-c constraints.txt {INDEX}" if flag else "-c constraints.txt")
    looked = any(call.startswith("-c import") for call in calls)
    assert looked == ("no NVIDIA GPU was found" in said) == (system == "Linux" and not gpu)
    assert ("is out of reach" in said) == (looked and not flag)
    assert calls[-1] == "-m pytest -k x"


def test_an_environment_that_is_up_to_date_is_left_alone(tmp_path):
    run(tmp_path, "Linux", None, True)
    (tmp_path / "calls").unlink()
    done = subprocess.run(["sh", "run", "test"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == ["-m pytest -n 2"] and "installing" not in done.stderr


def test_the_fast_tier_leaves_out_what_is_slow_distributed_or_of_experiments(tmp_path):
    calls, said = run(tmp_path, "Linux", True, True, "--fast", "-k", "two words")
    assert calls[-1] == "-m pytest -n 2 -m not slow and not distributed and not experiments -k two words"
    registered = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert {"slow", "distributed", "experiments"} == {line.split(":")[0] for line in registered}


def test_unknown_verbs_are_refused():
    done = subprocess.run(["sh", "run", "tset"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no verb 'tset'" in done.stderr and "usage: ./run VERB" in done.stderr
