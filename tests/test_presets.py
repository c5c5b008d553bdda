"""Published methods as routes: the effective weight of every group, written out."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from regions_parts import PEFT_NOISE, randomize

from routed_peft import GradientRouting, presets
from routed_peft.routes import Route, Routes


def table(routes: Routes, *groups: str) -> dict[str, list[float]]:
    """Return label -> effective weight of each group."""
    return {label: [route.weight(group) for group in groups] for label, route in routes.items()}


TABLES = [
    (presets.sgtm(), "base forget", {"forget": [0, 1], "retain": [1, 0], "unlabeled": [1, 1]}),
    (presets.sgtm("bio", 0.1), "base bio", {"forget": [0.1, 1], "retain": [1, 0], "unlabeled": [1, 1]}),
    (presets.inoculation(), "base trait", {"all": [1, 0]}),
    (presets.era(), "base forget", {"forget": [-0.75, 1], "retain": [1, 1], "unlabeled": [1, 1]}),
    (presets.era("bio", -0.5), "base bio", {"forget": [-0.5, 1], "retain": [1, 1], "unlabeled": [1, 1]}),
    (presets.classic(), "base forget", {"flagged": [0, 1], "unflagged": [1, 1], "anchor": [1, 0]}),
    (presets.exclusive("hack"), "base hack", {"flagged": [0, 1], "unflagged": [1, 0], "anchor": [1, 0]}),
    (presets.demix("bio", "rest"), "base bio rest", {"forget": [1, 1, 0], "retain": [1, 0, 1], "unlabeled": [1, 1, 1]}),
    (presets.subspace("style"), "base style", {"all": [1, 1]}),
    (presets.subspace("style", anchor=True), "base style", {"all": [1, 1], "anchor": [1, 0]}),
    (presets.control(), "base forget", {"forget": [1, 1], "retain": [1, 1], "unlabeled": [1, 1]}),
    (
        presets.gram(["bio", "cyber"]),
        "base bio cyber",
        {
            "core": [1, 0, 0],
            "bio": [0, 1, 0], "bio/spread": [1, 1, 0], "bio/robust": [1, 1, 0],
            "cyber": [0, 0, 1], "cyber/spread": [1, 0, 1], "cyber/robust": [1, 0, 1],
            "unlabeled": [1, 1, 1],
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("routes", "groups", "expected"), TABLES)
def test_every_label_trains_the_groups_of_its_publication(routes, groups, expected):
    assert table(routes, *groups.split()) == expected and list(routes) == list(expected)


def test_regions_that_learn_nothing_from_data_of_others_are_absent_from_it():
    """SGTM reads retain data without the region; ERA and exclusive routing read it with the region."""
    assert presets.sgtm("bio")["retain"].ablated == presets.classic("bio")["anchor"].ablated == ("bio",)
    assert (
        presets.exclusive("bio")["anchor"].ablated == presets.subspace("bio", anchor=True)["anchor"].ablated == ("bio",)
    )
    assert not any(route.ablated for route in presets.era("bio").values())
    assert presets.exclusive("bio")["unflagged"].ablated == ()
    assert presets.gram(["bio", "cyber"])["core"].ablated == ("bio", "cyber")
    assert presets.gram(["bio", "cyber"])["bio"].ablated == ("cyber",)


@pytest.mark.filterwarnings(PEFT_NOISE)
def test_a_base_is_trained_while_an_adapter_is_on_and_the_adapter_is_dropped():
    """The wish of PEFT's issue 1331."""
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["up_proj"]), adapter_name="trait")
    randomize(model, "trait")
    ids = torch.arange(3, 9)[None]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        on = model(input_ids=ids, labels=ids).loss
    routing = GradientRouting(model, presets.inoculation("trait"), train_base=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with routing(["all"]):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    optimizer.step()
    assert torch.equal(loss, on)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("lora_" in name for name in moved)
    routing.detach()
    plain = model.unload()
    assert not any("lora_" in name for name, _ in plain.named_parameters())


def test_presets_may_be_edited_and_stay_as_they_are_for_others():
    mine = presets.sgtm()
    mine["forget"] = Route()
    mine["more"] = Route()
    assert presets.sgtm()["forget"].weight("base") == 0 and "more" not in presets.sgtm()
