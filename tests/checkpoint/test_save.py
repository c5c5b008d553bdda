"""Saving runs: round trips, and files of others in the way."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import FAMILIES, KINDS, content, frozen, logits, lora, without, wrapped
from families import TIED, tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from routed_peft import presets
from routed_peft.adapters import RoutingRecord, routing_record, set_routing_record
from routed_peft.checkpoint import load_routed, load_weights, save_routed
from routed_peft.checkpoint.export import ablate
from routed_peft.routes import Route
from routed_peft.routing.gradient_routing import GradientRouting


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


@pytest.mark.parametrize("train_base", [True, False])
def test_the_inner_model_does_not_publish_regions(train_base: bool, tmp_path: Path) -> None:
    model = wrapped("mlp", names=("forget",))
    attached = GradientRouting(model, presets.sgtm("forget") if train_base else {"a": Route()}, train_base=train_base)
    path = save_routed(model, tmp_path / "run", train_base=True)

    def refused(model: Any) -> None:
        inner = model.get_base_model()
        for save in (inner.save_pretrained, inner.push_to_hub, copy.deepcopy(model).get_base_model().save_pretrained):
            with pytest.raises(ValueError, match=r"\['forget'\].*save_routed.*ablate"):
                save(str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    refused(model)
    attached.detach()
    refused(model)
    refused(load_routed(path, ["forget"]))
    save_routed(model, path)
    plain = copy.deepcopy(model).unload()
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), without(model, "forget"))


def changed(how: str, folder: Path) -> Any:
    """Return a base that is no longer what its name says."""
    read = AutoModelForCausalLM.from_pretrained
    if how == "subfolder":
        (folder / "sub").mkdir()
        for file in [file for file in folder.iterdir() if file.is_file()]:
            file.rename(folder / "sub" / file.name)
        return read(folder, subfolder="sub")
    base = read(folder)
    if how == "vocabulary":
        base.resize_token_embeddings(base.config.vocab_size + 1)
    elif how == "padded":
        base.resize_token_embeddings(base.config.vocab_size, pad_to_multiple_of=48)
    elif how == "merged":
        base = get_peft_model(base, lora(), "own").merge_and_unload()
    elif how == "weight":
        base.get_input_embeddings().weight.data[1, 2] += 1
    elif how == "configuration":
        base.config.rms_norm_eps = 0.5
        for module in base.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.5
    return base


@pytest.mark.parametrize("how", ["vocabulary", "padded", "merged", "weight", "configuration", "subfolder", "nothing"])
def test_a_frozen_base_that_was_changed_in_memory_is_saved(how: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    model = get_peft_model(changed(how, tmp_path / "base"), lora(), "forget").eval()
    path = save_routed(model, tmp_path / "run")
    assert (path / "model.safetensors").exists() == (how != "nothing")
    assert torch.equal(logits(load_routed(path, ["forget"])), logits(model))
    assert torch.equal(logits(load_routed(path)), without(model, "forget"))
    plain = AutoModelForCausalLM.from_pretrained(ablate(path, tmp_path / "out"))
    assert torch.equal(logits(plain), without(model, "forget"))


def test_files_outside_a_run_are_not_touched(tmp_path: Path) -> None:
    model = wrapped("mlp", names=("forget",))
    path = save_routed(model, tmp_path / "run", train_base=True)
    (tmp_path / "mine.txt").write_text("mine")
    (path / "link").symlink_to(tmp_path)
    data = json.loads((path / "routing.json").read_text())
    for name in ("../mine.txt", str(tmp_path / "mine.txt"), "link/mine.txt"):
        for key in ("other_files", "files"):
            listed: Any = [name] if key == "other_files" else {**data["files"], name: "0"}
            (path / "routing.json").write_text(json.dumps({**data, key: listed}))
            for act in (lambda: save_routed(model, path, train_base=True), lambda: load_routed(path)):
                with pytest.raises(ValueError, match="leads out of it"):
                    act()
    assert (tmp_path / "mine.txt").read_text() == "mine"
