"""A kind of region from outside the package: one class and one registration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import tiny, tokens
from peft import get_peft_model
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from routed_peft import GradientRouting, RoutedConfig, ablated, load_routed, presets, save_routed
from routed_peft.regions import RegionKind, register_region_kind
from routed_peft.regions.config import KINDS
from routed_peft.regions.layer import RoutedLayer


class Shift(nn.Module, RoutedLayer):
    """A layer whose regions each add a vector to its output."""

    adapter_layer_names: tuple[str, ...] = ("routed_shift",)
    region_outlets: ClassVar[tuple[str, ...]] = ("routed_shift",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: RoutedConfig, model: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.routed_shift = base_layer, nn.ModuleDict()
        self._disable_adapters, self.merged_adapters, self._active_adapter = False, [], adapter_name
        self.update_layer(adapter_name, config, model=model)

    def update_layer(self, adapter_name: str, config: RoutedConfig, *, model: nn.Module) -> None:
        self.routed_shift[adapter_name] = nn.Linear(1, self.base_layer.bias.numel(), bias=False)
        nn.init.zeros_(self._linear("routed_shift", adapter_name).weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.routed_shift and name not in self.merged_adapters:
                y = y + self.routed_shift[name](x.new_ones(*x.shape[:-1], 1))
        return y

    def check_mergeable(self) -> None:
        return

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.routed_shift:
                self.base_layer.bias.data += self._linear("routed_shift", name).weight.data[:, 0]
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        for name in self.merged_adapters:
            self.base_layer.bias.data -= self._linear("routed_shift", name).weight.data[:, 0]
        self.merged_adapters.clear()


def check_bias(name: str, module: nn.Module) -> None:
    if getattr(module, "bias", None) is None:
        raise ValueError(f"{name!r} has no bias: choose other `target_modules`")


@pytest.fixture
def shift() -> Iterator[None]:
    register_region_kind("shift", RegionKind((), {"gpt2": ["c_proj"]}, layer=Shift, check=check_bias))
    yield
    del KINDS["shift"]


def test_it_trains_ablates_saves_loads_and_merges(shift: None, tmp_path: Path) -> None:
    model = get_peft_model(tiny("gpt2"), RoutedConfig(kind="shift"), "forget")
    ids = tokens()
    routing = GradientRouting(model, presets.sgtm("forget"), train_base=True)
    received = routing.self_check({"input_ids": ids, "labels": ids})
    assert received["forget"] == {"base": False, "forget": True}
    with routing(["forget"] * len(ids)):
        model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for p in routing.parameters("forget"):
            p -= 10.0 * p.grad
    routing.detach()
    model.eval()
    on = model(input_ids=ids).logits
    with ablated(model, "forget"):
        off = model(input_ids=ids).logits
    assert not torch.allclose(on, off)
    save_routed(model, tmp_path / "run")
    again = load_routed(tmp_path / "run", regions=["forget"]).eval()
    assert torch.equal(again(input_ids=ids).logits, on)
    assert torch.equal(load_routed(tmp_path / "run").eval()(input_ids=ids).logits, off)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, on, atol=1e-5, rtol=1e-4)


def test_targets_are_checked_and_names_are_taken_once(shift: None) -> None:
    with pytest.raises(ValueError, match="has no bias"):
        get_peft_model(tiny("llama"), RoutedConfig(kind="shift", target_modules=["q_proj"]), "forget")
    with pytest.raises(ValueError, match="no default `target_modules`"):
        get_peft_model(tiny("llama"), RoutedConfig(kind="shift"), "forget")
    with pytest.raises(ValueError, match="`size` belongs to kind 'mlp'"):
        RoutedConfig(kind="shift", size=3)
    with pytest.raises(ValueError, match="a new name, got 'shift'"):
        register_region_kind("shift", RegionKind((), {}, layer=Shift))
    model = get_peft_model(tiny("gpt2"), RoutedConfig(kind="lora", target_modules=["c_proj"]), "bio")
    with pytest.raises(ValueError, match="holds a region of another kind"):
        model.add_adapter("forget", RoutedConfig(kind="shift"))


def test_without_registration_the_kind_is_unknown() -> None:
    with pytest.raises(ValueError, match="`kind` must be one of 'mlp', 'lora', 'subspace', .*, got 'shift'"):
        RoutedConfig(kind="shift")
