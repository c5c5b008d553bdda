"""Start a test's worker in two processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from places import PARTS


def in_two_processes(*command: str | Path, timeout: float = 900) -> str:
    """Run a script, or a module after ``-m``, by torchrun on one thread each; return what it printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def results_of_ranks(worker: str, out: Path) -> list[dict[Any, Any]]:
    """Run ``worker`` of `tests/parts`, and read what each of its two processes has saved in ``out``."""
    in_two_processes(PARTS / worker, out)
    return [torch.load(out / f"results-{rank}.pt", weights_only=True) for rank in (0, 1)]
