from __future__ import annotations

import importlib.metadata
import json
import os
import platform

import torch

from routed_peft.runs.provenance import all_versions, hardware, versions


def test_versions_are_those_that_are_installed():
    own = versions()
    assert list(own) == ["routed_peft", "torch", "transformers", "peft", "safetensors"]
    assert all(own[name] == importlib.metadata.version(name) for name in own)
    everything = all_versions()
    assert everything["python"] == platform.python_version() and everything.items() >= own.items()
    assert {"accelerate", "datasets", "tokenizers", "numpy"} <= everything.keys()


def test_a_library_without_metadata_is_unknown(monkeypatch):
    """As this one is where it runs from a source tree."""
    whole = importlib.metadata.version

    def version(name):
        if name == "routed_peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["routed_peft"] == "unknown" and versions()["torch"] == whole("torch")


def test_hardware_is_plain_data_and_counts_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = hardware()
    assert json.loads(json.dumps(found)) == found
    assert found["processes"] == 3 and found["cores"] == os.cpu_count() and found["threads"] == torch.get_num_threads()
    assert found["processor"] and 0.1 < found["memory_gb"] < 1e5 and len(found["gpus"]) == torch.cuda.device_count()
    monkeypatch.delenv("WORLD_SIZE")
    assert hardware()["processes"] == 1
