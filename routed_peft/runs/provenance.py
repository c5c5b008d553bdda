"""Hardware and library versions of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_CHECKPOINT = ("routed_peft", "torch", "transformers", "peft", "safetensors")
_TRAINING = ("accelerate", "datasets", "tokenizers", "numpy")


def hardware() -> dict[str, Any]:
    """Return machine, processor, memory, GPUs and processes of this run."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "machine": platform.platform(),
        "processor": next(names, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a checkpoint depends on."""
    found = {}
    for name in _CHECKPOINT:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from a source tree
            found[name] = "unknown"
    return found


def all_versions() -> dict[str, str]:
    """Return the versions of Python and of all libraries that a training run depends on."""
    training = {name: importlib.metadata.version(name) for name in _TRAINING}
    return {"python": platform.python_version(), **versions(), **training}
