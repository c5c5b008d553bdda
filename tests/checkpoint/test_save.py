"""Saving and loading runs: round trips, damage, and disks that are full."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import FAMILIES, config, logits, lora, without, wrapped
from families import TIED, tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

from routed_peft import presets
from routed_peft.adapters import RoutingRecord, routing_record, set_routing_record
from routed_peft.checkpoint import inspect_checkpoint, load_routed, load_weights, save_routed
from routed_peft.checkpoint import save as save_module
from routed_peft.checkpoint import staging as files_module
from routed_peft.checkpoint.staging import atomic_directory
from routed_peft.routing.gradient_routing import GradientRouting

KINDS = pytest.mark.parametrize("kind", ["mlp", "lora"])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def frozen(tmp_path: Path, kind: str = "lora", **saved: Any) -> tuple[PeftModel, Path]:
    """A run over a base that was saved before."""
    tiny("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(kind), "retain")
    model.add_adapter("forget", config(kind, size=4))
    model.base_model.set_adapter(["retain", "forget"])
    return model.eval(), save_routed(model, tmp_path / "run", base_adapters=["retain"], **saved)


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


# Round trips


@KINDS
@pytest.mark.parametrize("family", (*FAMILIES, "gpt_neox", "gemma3_text", "falcon"))
def test_a_trained_base_comes_back_bit_for_bit(kind: str, family: str, tmp_path: Path) -> None:
    model = wrapped(kind, family)
    with torch.no_grad():  # trained: no longer the initial base
        for name, parameter in model.named_parameters():
            if ".forget." not in name and ".bio." not in name:
                parameter *= 1.1
    path = save_routed(model, tmp_path / "run", train_base=True)
    ablated = AutoModelForCausalLM.from_pretrained(path)
    assert not isinstance(ablated, PeftModel) and torch.equal(logits(ablated), without(model, "forget", "bio"))
    assert (ablated.get_output_embeddings().weight is ablated.get_input_embeddings().weight) == (family in TIED)
    plain = load_routed(path)
    assert isinstance(plain, PreTrainedModel) and torch.equal(logits(plain), logits(ablated))
    assert torch.equal(logits(load_routed(path, ["forget", "bio"])), logits(model))
    assert torch.equal(logits(load_routed(path, ["bio"])), without(model, "forget"))
    assert not any("lora_" in name or "routed_" in name for name in load_file(path / "model.safetensors"))
    stock = PeftModel.from_pretrained(ablated, path / "bio", adapter_name="bio")
    assert torch.equal(logits(stock), without(model, "forget"))
    auto = AutoPeftModelForCausalLM.from_pretrained(path / "bio", adapter_name="bio")
    assert torch.equal(logits(auto), logits(stock))


@KINDS
def test_a_frozen_base_is_named_not_copied(kind: str, tmp_path: Path) -> None:
    model, path = frozen(tmp_path, kind)
    assert {item.name for item in path.iterdir()} == {"forget", "retain", "routing.json"}
    assert json.loads((path / "routing.json").read_text())["base"]["id"] == str(tmp_path / "base")
    ablated = load_routed(path)
    assert isinstance(ablated, PeftModel) and list(ablated.peft_config) == ["retain"]
    assert torch.equal(logits(ablated), without(model, "forget"))
    whole = load_routed(path, ["forget"])
    assert torch.equal(logits(whole), logits(model)) and whole.base_model.active_adapters == ["retain", "forget"]
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(ValueError, match="no longer there: give its new place as `base="):
        load_routed(path)
    assert torch.equal(logits(load_routed(path, ["forget"], base=tmp_path / "moved")), logits(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert torch.equal(logits(load_routed(path, ["forget"], base=loaded)), logits(model))


def test_a_frozen_base_that_was_never_saved_is_saved(tmp_path: Path) -> None:
    model = wrapped("lora", names=("forget",))
    path = save_routed(model, tmp_path / "run")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), without(model, "forget"))
    assert json.loads((path / "routing.json").read_text())["train_base"] is False


def test_an_initialisation_that_moves_the_base_is_not_done_again(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=2), "forget").eval()
    path = save_routed(model, tmp_path / "run")
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(model))
    assert torch.equal(logits(load_routed(path)), without(model, "forget"))


def test_a_transformers_model_with_add_adapter(tmp_path: Path) -> None:
    model = tiny("llama")
    model.add_adapter(lora(), "forget")
    path = save_routed(model, tmp_path / "run", train_base=True)
    assert model._hf_peft_config_loaded
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(model))
    other = tiny("llama", seed=2)
    other.add_adapter(lora(), "forget")
    load_weights(other, path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@KINDS
def test_dtypes_are_kept(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = wrapped(kind, names=("forget",), dtype=dtype)
    path = save_routed(model, tmp_path / "run", train_base=True)
    whole = load_routed(path, ["forget"])
    assert {name: p.dtype for name, p in whole.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert torch.equal(logits(whole), logits(model))


def test_what_the_routing_left_on_the_model_is_used_and_remembered(tmp_path: Path) -> None:
    model: Any = wrapped("lora", names=("retain", "forget"))
    routes = presets.sgtm("forget")
    set_routing_record(model, RoutingRecord(routes, train_base=True, base_adapters=("retain",)))
    path = save_routed(model, tmp_path / "run", tokens_per_route={"retain": 3}, extra={"seed": 1})
    data = json.loads((path / "routing.json").read_text())
    assert data["train_base"] and data["base_adapters"] == ["retain"] and data["regions"] == ["forget"]
    assert list(data["routes"]) == list(routes) and data["extra"] == {"seed": 1}
    region = json.loads((path / "forget" / "region.json").read_text())
    assert region["tokens_per_route"] == {"retain": 3} and region["base"]["id"] == str(path)
    loaded: Any = load_routed(path, ["forget"], is_trainable=True)
    assert {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad} == {"retain", "forget"}
    again = save_routed(loaded, tmp_path / "again")
    assert json.loads((again / "routing.json").read_text())["base_adapters"] == ["retain"]
    assert routing_record(loaded).routes == routes


def test_kept_regions_are_remembered_as_far_as_they_are_there(tmp_path: Path) -> None:
    path = save_routed(wrapped("lora"), tmp_path / "run", train_base=True, kept_regions=["bio"])
    for regions, kept in (["forget", "bio"], ["bio"]), (["forget"], []):
        again = save_routed(load_routed(path, regions), tmp_path / f"again-{len(regions)}")
        assert json.loads((again / "routing.json").read_text())["kept_regions"] == kept


def test_a_gathered_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    model = wrapped("mlp", names=("forget",))
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = save_routed(model, tmp_path / "run", train_base=True, state_dict=state)
    assert torch.equal(load_file(path / "model.safetensors")["lm_head.weight"], model.lm_head.weight + 1)
    saved = load_file(path / "forget" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.routed_up.weight"
    assert torch.equal(saved[name], state[name.replace(".weight", ".forget.weight")])
    del state["base_model.model.lm_head.weight"]
    with pytest.raises(ValueError, match="lacks 1 weights of the base"):
        save_routed(model, tmp_path / "other", train_base=True, state_dict=state)


@pytest.mark.parametrize("peft", [True, False])
def test_a_model_is_saved_and_resumed_while_routed(peft: bool, tmp_path: Path) -> None:
    models: list[Any] = [wrapped("mlp", names=("forget",), seed=seed) if peft else tiny("llama") for seed in (0, 1)]
    routings = []
    for model in models:
        if not peft:
            model.add_adapter(lora(), "forget")
        routings.append(GradientRouting(model, presets.sgtm("forget"), train_base=True))
    path = save_routed(models[0], tmp_path / "run")
    load_weights(models[1], path)
    for routing in routings:
        routing.detach()
    assert torch.equal(logits(models[1]), logits(models[0]))
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(models[0]))
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


# Loading in place


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_load_in_place(kind: str, family: str, tmp_path: Path) -> None:
    model, other = wrapped(kind, family), wrapped(kind, family, seed=5)
    for name, parameter in model.named_parameters():
        if ".forget." in name:
            parameter.data += 0.1
    path = save_routed(model, tmp_path / "run", train_base=True)
    before = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    load_weights(other, path)
    assert torch.equal(logits(other), logits(model))
    assert before == {name: parameter.data_ptr() for name, parameter in other.named_parameters()}


def test_loading_in_place_is_strict(run: Path, tmp_path: Path) -> None:
    model = wrapped("mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds the adapters \['forget'\], the model has \['bio', 'forget'\]"):
        load_weights(model, run)
    three = wrapped("lora", names=("forget",))
    with pytest.raises(ValueError, match=r"the adapter 'forget' in .* lacks"):
        load_weights(three, run)
    deeper = wrapped("mlp", names=("forget",), num_hidden_layers=1)
    with pytest.raises(ValueError, match="has in addition"):
        load_weights(deeper, run)
    narrow = wrapped("mlp", names=("forget",), intermediate_size=20)
    with pytest.raises(ValueError, match=r"does not fit|another base|shape"):
        load_weights(narrow, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    _, frozen_run = frozen(tmp_path / "frozen")
    with pytest.raises(ValueError, match="holds no base weights"):
        load_weights(wrapped("lora", names=("retain", "forget")), frozen_run, train_base=True)
    with pytest.raises(ValueError, match="another base"):
        load_weights(wrapped("lora", names=("retain", "forget"), seed=9), frozen_run)


# Overwriting


def test_a_later_save_replaces_its_files_and_nothing_else(tmp_path: Path) -> None:
    first, second = wrapped("mlp"), wrapped("mlp", names=("forget",), seed=4)
    path = save_routed(first, tmp_path / "run", train_base=True)
    mine = {"checkpoint-5/model.safetensors": b"5", "trainer_state.json": b"{}", "bio/notes.txt": b"mine"}
    for name, data in mine.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    save_routed(second, path, train_base=True)
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(second))
    after = content(path)
    assert {name: after[name] for name in mine} == mine
    assert not {"bio/adapter_model.safetensors", "bio/region.json"} & set(after)
    assert not [item for item in path.iterdir() if item.name.startswith(".")]
    base, home = AutoModelForCausalLM.from_pretrained(path), tmp_path / "home"
    base.save_pretrained(home)
    frozen_ = get_peft_model(AutoModelForCausalLM.from_pretrained(home), lora(), "forget")
    save_routed(frozen_, path)  # a frozen base now: the old weights must not be mistaken for it
    assert not (path / "model.safetensors").exists() and (path / "trainer_state.json").exists()


def test_strange_weights_in_the_way_are_refused(run: Path, tmp_path: Path) -> None:
    model = wrapped("mlp", names=("forget",))
    for strange in ("model.safetensors", "pytorch_model.bin", "adapter_config.json", "forget/notes.txt"):
        path = tmp_path / f"at-{strange.replace('/', '-')}"
        (path / strange).parent.mkdir(parents=True)
        (path / strange).write_text("mine")
        with pytest.raises(ValueError, match="`save_routed` did not write"):
            save_routed(model, path, train_base=True)
        assert content(path) == {strange: b"mine"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        save_routed(model, tmp_path / "file", train_base=True)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [full_disk, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)])
def test_a_full_disk_or_an_interruption_leaves_all_as_it_was(
    exists: bool, error: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    if exists:
        save_routed(wrapped("mlp"), path, train_base=True)
    before = content(tmp_path)
    other = wrapped("mlp", seed=3)
    steps: list[tuple[Any, str]] = [
        (modeling_utils, "safe_save_file"),
        (save_module, "save_file"),
        (save_module, "write_json"),
        (files_module, "_flush"),
    ]
    for module, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, error)
            with pytest.raises((OSError, KeyboardInterrupt)):
                save_routed(other, path, train_base=True)
        assert content(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([path] if exists else [])


@pytest.mark.parametrize("fail_at", range(1, 12))
def test_an_error_while_files_are_moved_puts_them_back(
    fail_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    old = {"routing.json": "old", "a": "old", "forget/b": "old", "mine": "mine"}
    for name, text in old.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fail_at:
            raise OSError(errno.EIO, "broken disk")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    new = {"routing.json": "new", "forget/b": "new", "c": "new"}

    def write() -> None:
        with atomic_directory(path, ["routing.json", "a", "forget/b"]) as aside:
            for name, text in new.items():
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(text)

    if fail_at <= 6:  # three files out, three in
        with pytest.raises(OSError, match="broken disk"):
            write()
        assert content(path) == {name: text.encode() for name, text in old.items()}
    else:
        write()
        assert content(path) == {name: text.encode() for name, text in {**new, "mine": "mine"}.items()}
    assert {item.name for item in path.iterdir()} <= {"routing.json", "a", "c", "forget", "mine"}


# Damage


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


def test_a_save_that_was_killed_says_where_the_earlier_files_are(run: Path) -> None:
    (run / ".run.0.old").mkdir()
    (run / "routing.json").rename(run / ".run.0.old" / "routing.json")
    with pytest.raises(ValueError, match=r"interrupted save left the files before it in .*\.run\.0\.old"):
        load_routed(run)


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


@KINDS
def test_a_region_goes_on_its_own_base_only(kind: str, tmp_path: Path) -> None:
    one = save_routed(wrapped(kind, names=("forget",)), tmp_path / "one", train_base=True)
    two = save_routed(wrapped(kind, names=("forget",), seed=7), tmp_path / "two", train_base=True)
    with pytest.raises(ValueError, match="another base model"):
        load_routed(one, {"forget": two})
    with pytest.raises(ValueError, match="another base model"):
        load_routed(one, ["forget"], base=tiny("llama", seed=8))
    shutil.copytree(two / "forget", one / "forget", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="another base model"):
        load_routed(one, ["forget"])


def test_regions_from_elsewhere(run: Path, tmp_path: Path) -> None:
    whole = logits(load_routed(run, ["forget"]))
    elsewhere = tmp_path / "regions"
    elsewhere.mkdir()
    shutil.move(run / "forget", elsewhere / "forget")
    for place in (elsewhere, elsewhere / "forget"):
        assert torch.equal(logits(load_routed(run, {"forget": place})), whole)
    load_routed(run)
    with pytest.raises(ValueError, match="regions have a repository or directory of their own"):
        load_routed(run, ["forget"])
    with pytest.raises(ValueError, match="no folder 'bio'"):
        load_routed(run, {"bio": elsewhere})
    with pytest.raises(ValueError, match="cannot be called 'default'"):
        load_routed(run, {"default": elsewhere / "forget"})
    (elsewhere / "forget" / "region.json").unlink()
    with pytest.raises(ValueError, match=r"lacks region.json, so nothing says which base"):
        load_routed(run, {"forget": elsewhere})


def test_a_file_of_another_adapter_is_refused(run: Path) -> None:
    weights, about = run / "forget" / "adapter_model.safetensors", run / "forget" / "region.json"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.mlp.routed_other.weight"] = torch.ones(1)
    save_file(tensors, weights)
    for path, key in ((about, "adapter_model.safetensors"), (run / "routing.json", "forget/adapter_model.safetensors")):
        data = json.loads(path.read_text())
        data["files"][key] = files_module.sha256(weights)
        path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="has in addition 1 tensors"):
        load_routed(run, ["forget"])


# What the user may have meant


def test_unknown_names(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`regions` names 'forgt'; the regions of .* are \['forget'\]"):
        load_routed(run, ["forgt"])
    with pytest.raises(ValueError, match="`regions` is a list"):
        load_routed(run, "forget")
    for place in ("./nowhere", str(tmp_path / "nowhere"), str(run / "config.json")):
        with pytest.raises(ValueError, match="is no directory"):
            load_routed(place)
    with pytest.raises(ValueError, match="`revision` needs a Hub id"):
        load_routed(run, revision="main")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny("llama"), {}, "has no adapter"),
        (wrapped("lora"), {"base_adapters": ["retain"]}, r"`base_adapters` names 'retain'; .*\['forget', 'bio'\]"),
        (wrapped("lora"), {"kept_regions": ["boi"]}, r"`kept_regions` names 'boi'; .*\['forget', 'bio'\]"),
        (wrapped("lora", names=("default",)), {}, "cannot be called 'default'"),
        (wrapped("lora", names=("forget",)), {}, "merged into"),
        (get_peft_model(tiny("llama"), lora(modules_to_save=["lm_head"]), "forget"), {}, "trained copy"),
    ]
    cases[4][0].merge_adapter()
    for model, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            save_routed(model, tmp_path / "run", **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rotes'"):
        save_routed(wrapped("lora"), tmp_path / "run", rotes={})
    with pytest.raises(TypeError, match="unwrap"):
        save_routed(torch.nn.Linear(1, 1), tmp_path / "run")
    assert not list(tmp_path.iterdir())


# Inspection


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


def test_files_that_other_processes_write_meanwhile_stay(tmp_path):
    """Every process of a Trainer saves its random state into the checkpoint, and none waits for the first one's model."""
    path = tmp_path / "checkpoint-2"
    with atomic_directory(path) as aside:
        (aside / "routing.json").write_text("{}")
        path.mkdir()
        (path / "rng_state_1.pth").write_text("theirs")
    assert sorted(file.name for file in path.iterdir()) == ["rng_state_1.pth", "routing.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]
