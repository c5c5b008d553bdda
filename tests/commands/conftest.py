"""The saved run that commands are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_parts import byte_tokenizer, tiny_llama
from peft import get_peft_model

from routed_peft import Route, RoutedConfig, presets, save_routed


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Path:
    """A saved run with the regions `forget` and `bio`."""
    path = tmp_path_factory.mktemp("cli") / "run"
    model = get_peft_model(tiny_llama(), RoutedConfig(size=3, init="model"), adapter_name="forget")
    model.add_adapter("bio", RoutedConfig(size=4, init="model"))
    routes = {**presets.sgtm("forget"), "bio": Route(weights={"base": 0.5})}
    return save_routed(
        model, path, routes=routes, tokenizer=byte_tokenizer(), train_base=True, tokens_per_route={"forget": 12000}
    )
