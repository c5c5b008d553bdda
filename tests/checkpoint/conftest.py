"""A saved run for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_parts import wrapped

from routed_peft import presets
from routed_peft.checkpoint import save_routed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    routes = presets.sgtm("forget")
    return save_routed(
        wrapped("mlp", names=("forget",)),
        tmp_path / "run",
        routes=routes,
        train_base=True,
        tokens_per_route={"forget": 7},
    )
