"""Loading runs: in place and anew, strictly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_parts import FAMILIES, KINDS, config, content, frozen, logits, wrapped
from families import tiny
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from routed_peft.checkpoint import load_routed, load_weights, save_routed
from routed_peft.checkpoint import staging as files_module
from routed_peft.regions import RoutedConfig


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


def region_config(kind: str) -> Any:
    return RoutedConfig(size=4, r=2, embeddings="full", init="model") if kind == "whole" else config(kind)


def with_regions(base: PreTrainedModel, kind: str) -> PeftModel:
    """A model with the regions "forget" and "bio", all of whose tensors matter."""
    torch.manual_seed(0)
    model = get_peft_model(base, region_config(kind), "forget")
    model.add_adapter("bio", region_config(kind))
    model.base_model.set_adapter(["forget", "bio"])
    for name, parameter in model.named_parameters():
        if ".forget" in name or ".bio" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def by_hand(base: PreTrainedModel, kind: str, run: Path) -> PeftModel:
    """A changed base with the tensors of a run's regions, by PEFT's own means."""
    model = with_regions(base, kind)
    for name in ("forget", "bio"):
        set_peft_model_state_dict(model, load_file(run / name / "adapter_model.safetensors"), name)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["mlp", "lora", "whole"])
def test_regions_go_on_a_changed_base_on_request(kind: str, family: str, tmp_path: Path) -> None:
    run = save_routed(with_regions(tiny(family), kind), tmp_path / "run", train_base=True)
    before = content(run)
    tiny(family, seed=8).save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="another base model: the content differs"):
        load_routed(run, ["forget", "bio"], base=tmp_path / "changed")
    expected = by_hand(tiny(family, seed=8), kind, run)
    for base in (tmp_path / "changed", tiny(family, seed=8)):
        with pytest.warns(
            UserWarning, match=r"\['the run', 'forget', 'bio'\].*values of its weights.*Nobody has measured"
        ):
            model = load_routed(run, ["forget", "bio"], base=base, allow_changed_base=True)
        assert torch.equal(logits(model), logits(expected))
        assert not torch.allclose(logits(model), logits(tiny(family, seed=8)))
    assert content(run) == before
    with pytest.raises(ValueError, match="another base model"):
        load_routed(run, ["forget"], base=tiny(family, seed=8))
    load_routed(run, ["forget"], base=tiny(family), allow_changed_base=True)  # the same one: no warning


@pytest.mark.parametrize("kind", ["mlp", "lora", "whole"])
def test_a_changed_base_has_the_shape_and_configuration_of_before(kind: str, tmp_path: Path) -> None:
    run = save_routed(with_regions(tiny("llama"), kind), tmp_path / "run", train_base=True)
    for change, differs in (({"intermediate_size": 28}, "structure"), ({"rms_norm_eps": 0.1}, "configuration")):
        with pytest.raises(ValueError, match=f"another base model: the {differs} differs"):
            load_routed(run, ["forget"], base=tiny("llama", seed=8, **change), allow_changed_base=True)
        with pytest.raises(ValueError, match=f"another base model: the {differs} differs"):
            load_routed(run, base=tiny("llama", seed=8, **change), allow_changed_base=True)
    with pytest.raises(ValueError, match=r"`allow_changed_base=True` needs the changed base"):
        load_routed(run, ["forget"], allow_changed_base=True)


def test_a_changed_base_that_cannot_be_compared(run: Path) -> None:
    with (
        pytest.warns(UserWarning, match="Nobody has measured"),
        pytest.warns(UserWarning, match="only the names and shapes"),
    ):
        load_routed(run, ["forget"], base=tiny("llama", torch.float16), allow_changed_base=True)


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
    for path, changed in ((about, [weights]), (run / "routing.json", [weights, about])):
        data = json.loads(path.read_text())
        for file in changed:
            data["files"][file.relative_to(path.parent).as_posix()] = files_module.sha256(file)
        path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="has in addition 1 tensors"):
        load_routed(run, ["forget"])


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
