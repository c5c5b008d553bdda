"""`Layout`: the regions that belong to a model, also where a run was saved before ``routing.json`` had the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_parts import wrapped

from routed_peft import presets
from routed_peft.checkpoint import save_routed
from routed_peft.checkpoint.layout import Layout

ROUTED, CONTROL = presets.sgtm("forget"), presets.control()


def read(path: Path) -> Layout:
    return Layout.read(path, str(path))


@pytest.mark.parametrize("kept", [[], ["forget"]])
def test_kept_regions_are_in_the_file(kept: list[str], tmp_path: Path) -> None:
    path = save_routed(wrapped("mlp", names=("forget",)), tmp_path / "run", routes=CONTROL, kept_regions=kept)
    (path / "run.json").write_text(json.dumps({"config": {"recipe": {"arm": "none"}}}))
    assert read(path).kept_regions == kept


@pytest.mark.parametrize(
    ("routes", "config", "kept"),
    [
        (CONTROL, {"recipe": {"arm": "none"}}, ["forget"]),
        (CONTROL, {"recipe": {"arm": "perfect_filter"}}, ["forget"]),
        (CONTROL, {"arm": "filter"}, ["forget"]),
        (CONTROL, {"recipe": {"arm": "routed", "method": "control"}}, []),
        (CONTROL, {"recipe": {}}, []),
        (CONTROL, None, []),
        (ROUTED, {"recipe": {"arm": "none"}}, []),
        (None, {"recipe": {"arm": "none"}}, []),
    ],
)
def test_older_runs_keep_the_regions_of_an_arm_without_routing(routes, config, kept, tmp_path: Path) -> None:
    path = save_routed(wrapped("mlp", names=("forget",)), tmp_path / "run", routes=routes)
    data = json.loads((path / "routing.json").read_text())
    del data["kept_regions"]
    (path / "routing.json").write_text(json.dumps(data))
    if config is not None:
        (path / "run.json").write_text(json.dumps({"config": config}))
    assert read(path).kept_regions == kept
