"""The text of model cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from routed_peft.checkpoint.layout import Layout
from routed_peft.checkpoint.model_card import model_card


def make_layout(root: Path, **data: object) -> Layout:
    (root / "forget").mkdir()
    (root / "forget/adapter_config.json").write_text(json.dumps({"peft_type": "ROUTED", "size": 64}))
    routes = {"forget": {"weights": {"base": 0}}, "retain": {"ablated": ["forget"]}}
    plain = {
        "regions": ["forget"],
        "base_adapters": [],
        "routes": routes,
        "versions": {"routed_peft": "1", "torch": "2"},
    }
    return Layout(root, plain | {"tokens_per_route": {"forget": 12, "retain": 3}} | data, "src")


@pytest.mark.parametrize(("regions_repo", "of_regions"), [(None, False), ("org/key", False), ("org/key", True)])
def test_a_card_of_a_trained_base(tmp_path: Path, regions_repo: str | None, of_regions: bool) -> None:
    layout = make_layout(tmp_path, base={"id": None, "trained_from": {"id": "org/first"}})
    text = model_card(layout, "org/model", regions_repo=regions_repo, of_regions=of_regions)
    card = ModelCard(text)
    assert card.data.base_model == ("org/model" if of_regions else "org/first")
    assert card.data.library_name == ("peft" if of_regions else "transformers")
    assert f"\n# {'org/key' if of_regions else 'org/model'}\n" in text
    assert "| `forget` | ROUTED, 64 hidden units per MLP | forget |\n" in text
    assert "Tokens seen in training: forget 12, retain 3.\n" in text
    assert 'AutoModelForCausalLM.from_pretrained("org/model")\n' in text
    assert ("The regions are not published." in text) == (regions_repo is None)
    assert ('load_routed("org/model", regions={"forget": "org/key"})\n' in text) == (regions_repo is not None)
    assert text.endswith("Made with routed_peft 1, torch 2.")


def test_a_card_of_a_frozen_base_names_it(tmp_path: Path) -> None:
    layout = make_layout(
        tmp_path, base={"id": "org/base", "revision": "a"}, base_adapters=["retain"], tokens_per_route=None
    )
    text = model_card(layout, "org/model", regions_repo=None, of_regions=False)
    assert 'model = load_routed("org/model")  # the base is org/base\n' in text
    assert "Tokens seen" not in text and ModelCard(text).data.base_model == "org/base"
