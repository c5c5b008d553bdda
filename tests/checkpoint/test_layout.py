"""`Layout`: damaged runs, and the regions that belong to a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_parts import wrapped

from routed_peft import presets
from routed_peft.checkpoint import inspect_checkpoint, load_routed, load_weights, save_routed
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


def test_a_byte_that_was_changed_and_a_file_cut_short(run: Path) -> None:
    for name in ("model.safetensors", "forget/adapter_model.safetensors"):
        good = (run / name).read_bytes()
        for bad in (good[:-3] + bytes([good[-3] ^ 1]) + good[-2:], good[: len(good) // 2], b""):
            (run / name).write_bytes(bad)
            with pytest.raises(ValueError, match=rf"{Path(name).name} in .* is truncated or was tampered with"):
                load_routed(run, ["forget"])
            with pytest.raises(ValueError, match="truncated or was tampered"):
                load_weights(wrapped("mlp", names=("forget",)), run)
        (run / name).write_bytes(good)
    load_routed(run, ["forget"])


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("routing.json", "has no routing.json"),
        ("model.safetensors", "lacks the file model.safetensors"),
        ("forget", "lacks the folder 'forget' of the region"),
        ("forget/region.json", "lacks region.json"),
        ("forget/adapter_config.json", "lacks adapter_config.json"),
        ("forget/adapter_model.safetensors", "lacks adapter_model.safetensors"),
    ],
)
def test_a_missing_piece_is_named(piece: str, message: str, run: Path) -> None:
    shutil.move(run / piece, run.parent / "elsewhere")
    with pytest.raises(ValueError, match=message):
        load_routed(run, ["forget"])


def test_what_an_interrupted_save_left_is_named(run: Path) -> None:
    left = [run / ".routed_peft-0123456789abcdef", run.parent / ".run.0123abcd.tmp"]
    for folder in left:
        (folder / "forget").mkdir(parents=True)
    for place in left:
        assert any(str(place) in problem for problem in inspect_checkpoint(run)["problems"])
    (run / "routing.json").rename(run / "elsewhere.json")
    with pytest.raises(
        ValueError, match=r"interrupted save left .*/\.routed_peft-0123456789abcdef, which may hold a copy"
    ):
        load_routed(run)
    (run / "elsewhere.json").rename(run / "routing.json")
    save_routed(load_routed(run, ["forget"]), run, train_base=True)
    assert not any(folder.exists() for folder in left) and inspect_checkpoint(run)["problems"] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "lacks"),
        (None, "format version 99.*upgrade"),
    ],
)
def test_a_damaged_routing_json(text: str | None, message: str, run: Path) -> None:
    data = json.loads((run / "routing.json").read_text())
    (run / "routing.json").write_text(json.dumps({**data, "format_version": 99}) if text is None else text)
    with pytest.raises(ValueError, match=message):
        load_routed(run)


@pytest.mark.parametrize("name", ["adapter_config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_planted_weights_are_not_loaded(name: str, run: Path) -> None:
    (run / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds \['{name}'\], which `save_routed` did not write"):
        load_routed(run)
