"""Loading runs: in place and anew, strictly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_parts import FAMILIES, KINDS, frozen, logits, wrapped
from families import tiny
from safetensors.torch import load_file, save_file

from routed_peft.checkpoint import load_routed, load_weights, save_routed
from routed_peft.checkpoint import staging as files_module


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
