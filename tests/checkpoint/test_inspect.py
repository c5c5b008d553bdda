"""Inspection of runs, regions and plain checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_parts import frozen
from safetensors.torch import load_file

from routed_peft.checkpoint import inspect_checkpoint


def test_inspection_of_a_run(run: Path) -> None:
    about = inspect_checkpoint(run)
    assert about["kind"] == "trained base" and about["problems"] == [] and about["base_adapters"] == []
    (region,) = about["regions"]
    sizes = [tensor.numel() for tensor in load_file(run / "forget" / "adapter_model.safetensors").values()]
    assert region["parameters"] == sum(sizes) and region["type"] == "ROUTED" and region["size"] == 3
    assert region["present"] and region["fingerprint_ok"] and region["labels"] == ["forget", "unlabeled"]
    assert about["tokens_per_route"] == {"forget": 7}
    weights = run / "forget" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    assert "truncated" in inspect_checkpoint(run)["problems"][0]
    shutil.rmtree(run / "forget")
    about = inspect_checkpoint(run)
    assert not about["regions"][0]["present"] and "lacks the folder" in about["problems"][0]


def test_inspection_of_everything_else(tmp_path: Path) -> None:
    _, path = frozen(tmp_path)
    about = inspect_checkpoint(path)
    assert about["kind"] == "frozen base" and about["problems"] == []
    assert [entry["name"] for entry in about["base_adapters"]] == ["retain"] and about["base_adapters"][0]["r"] == 2
    assert inspect_checkpoint(path / "forget")["kind"] == "region"
    assert inspect_checkpoint(tmp_path / "base")["kind"] == "plain checkpoint"
    data = json.loads((path / "forget" / "region.json").read_text())
    (path / "forget" / "region.json").write_text(json.dumps({**data, "base_fingerprint": {"structure": "other"}}))
    assert "another base" in inspect_checkpoint(path)["problems"][0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it is no run, region or checkpoint"):
        inspect_checkpoint(tmp_path / "empty")
