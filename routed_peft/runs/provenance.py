"""Versions of libraries and the hardware of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("accelerate", "datasets", "tokenizers", "numpy")  # beside those that a checkpoint names


def hardware() -> dict[str, Any]:
    """Return what this process runs on.

    >>> sorted(hardware())
    ['cores', 'gpus', 'machine', 'memory_gb', 'processes', 'processor', 'threads']
    """
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
    """Return the versions of the libraries that decide what a checkpoint means."""
    found = {}
    for name in ("routed_peft", "torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from a source tree
            found[name] = "unknown"
    return found
