"""`Layout`: damaged runs, and the regions that belong to a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_parts import frozen, wrapped
from families import tiny

from routed_peft import presets
from routed_peft.checkpoint import inspect_checkpoint, load_routed, load_weights, save_routed
from routed_peft.checkpoint.export import ablate
from routed_peft.checkpoint.layout import Layout
from routed_peft.checkpoint.staging import sha256
from routed_peft.data import train_tokenizer

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


def test_every_file_of_a_run_is_verified(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a few words"], 258)
    path = save_routed(wrapped("mlp", names=("forget",)), tmp_path / "run", train_base=True, tokenizer=tokenizer)
    names = [
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file() and file.name != "routing.json"
    ]
    assert {"config.json", "tokenizer_config.json", "forget/adapter_config.json"} <= set(names)
    for name in names:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole + b" ")
        with pytest.raises(ValueError, match="tampered"):
            load_routed(path, ["forget"])
        assert "tampered" in inspect_checkpoint(path)["problems"][0]
        (path / name).write_bytes(whole)
    load_routed(path, ["forget"])


def test_a_run_of_an_earlier_version_still_loads(run: Path) -> None:
    data = json.loads((run / "routing.json").read_text())
    data["other_files"] = sorted(name for name in data["files"] if not name.endswith(".safetensors"))
    data["files"] = {name: hash_ for name, hash_ in data["files"].items() if name.endswith(".safetensors")}
    del data["base"]["fingerprint"]["config"]
    (run / "routing.json").write_text(json.dumps(data))
    about = json.loads((run / "forget/region.json").read_text())
    del about["base_fingerprint"]["config"], about["files"]["adapter_config.json"]
    (run / "forget/region.json").write_text(json.dumps(about))
    load_routed(run, ["forget"])
    assert inspect_checkpoint(run)["problems"] == []
    save_routed(load_routed(run, ["forget"]), run, train_base=True)
    assert "config.json" in json.loads((run / "routing.json").read_text())["files"]


def test_an_index_that_leads_elsewhere_is_refused(run: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "sub/evil.safetensors"}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds \['sub/evil.safetensors'\]"):
        load_routed(run)
    assert inspect_checkpoint(run)["problems"]


@pytest.mark.parametrize("base_adapters", [True, False])
@pytest.mark.parametrize("what", ["weights", "configuration"])
def test_an_overwritten_frozen_base_is_noticed_without_regions(what: str, base_adapters: bool, tmp_path: Path) -> None:
    model, path = frozen(tmp_path)
    if not base_adapters:  # nothing is loaded beside the base
        path = save_routed(model, tmp_path / "alone", base_adapters=[])
        for region in ("retain", "forget"):
            shutil.rmtree(path / region)
    tiny("llama", **({"seed": 3} if what == "weights" else {"rms_norm_eps": 0.5})).save_pretrained(tmp_path / "base")
    for act in (lambda: load_routed(path), lambda: ablate(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"the {'content' if what == 'weights' else 'configuration'} differs"):
            act()


def test_an_initialization_that_would_change_the_base_is_noticed(tmp_path: Path) -> None:
    _, path = frozen(tmp_path)
    config = path / "retain/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))
    about, routing = path / "retain/region.json", path / "routing.json"
    for file, changed in ((about, [config]), (routing, [config, about])):  # as somebody would who knows the format
        data = json.loads(file.read_text())
        data["files"] |= {one.relative_to(file.parent).as_posix(): sha256(one) for one in changed}
        file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="content differs"):
        load_routed(path)
