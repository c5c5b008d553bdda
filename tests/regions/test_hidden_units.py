"""Hidden units that are appended to an MLP, and taken away again bit for bit, in every layout."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, tiny
from torch import nn

from routed_peft.architectures import find_mlps, mlp_layout, width
from routed_peft.regions.hidden_units import (
    HiddenUnits,
    check_uniform,
    check_widenable,
    count_hidden_units,
    pad_to_widest,
    truncate,
    widen,
)

LAYOUTS = pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "phi", "falcon", "gpt_neox"])


def mlp_of(family: str) -> nn.Module:
    return next(iter(find_mlps(tiny(family, torch.float64)).values()))


def hidden_of(mlp: nn.Module) -> int:
    return width(getattr(mlp, mlp_layout(mlp).down), "out")


def random_units(n: int, hidden: int) -> HiddenUnits:
    generator = torch.Generator().manual_seed(n)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return HiddenUnits(draw(n, hidden), draw(hidden, n), draw(n, hidden), draw(n), draw(n))


@LAYOUTS
def test_units_add_their_own_output_and_can_be_taken_away_bit_for_bit(family):
    mlp = mlp_of(family)
    layout, hidden, before = mlp_layout(mlp), hidden_of(mlp), copy.deepcopy(mlp.state_dict())
    n, parameters = count_hidden_units(mlp, layout), list(mlp.parameters())
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, units = mlp(x), random_units(4, hidden)
    alone = copy.deepcopy(mlp)
    widen(mlp, layout, units)
    assert count_hidden_units(mlp, layout) == n + 4
    both = mlp(x)
    # an MLP of the new units alone, with the bias of the output once
    for projection in (getattr(alone, name) for name in filter(None, (layout.up, layout.gate))):
        projection.weight.data.zero_()
    getattr(alone, layout.down).weight.data.zero_()
    widen(alone, layout, units)
    bias = getattr(alone, layout.down).bias
    torch.testing.assert_close(both - plain, alone(x) - (0 if bias is None else bias))
    assert (both - plain).abs().max() > 1e-3
    truncate(mlp, layout, n)
    assert count_hidden_units(mlp, layout) == n
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert all(own is now for own, now in zip(parameters, mlp.parameters(), strict=True)), (
        "an optimizer's references hold"
    )
    torch.testing.assert_close(mlp(x), plain, rtol=0, atol=0)


@LAYOUTS
def test_units_of_zeros_change_no_output(family):
    mlp = mlp_of(family)
    x = torch.randn(3, hidden_of(mlp), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = mlp(x)
    widen(mlp, mlp_layout(mlp), HiddenUnits.zeros(5, hidden_of(mlp)))
    torch.testing.assert_close(mlp(x), plain, rtol=0, atol=1e-12)


@LAYOUTS
def test_features_are_those_of_the_weights(family):
    """Layers say how many features come in and go out."""
    mlp = mlp_of(family)
    layout = mlp_layout(mlp)
    widen(mlp, layout, random_units(4, hidden_of(mlp)))
    for name in filter(None, (layout.up, layout.gate, layout.down)):
        layer = getattr(mlp, name)
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
        else:
            assert (layer.nx, layer.nf) == tuple(layer.weight.shape)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gpt_neo"])
def test_narrow_mlps_are_padded_to_the_widest_and_the_configuration_says_so(family):
    model = FAMILIES[family]()
    mlps = list(find_mlps(model).values())
    field = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(family, "intermediate_size")
    n, ids = count_hidden_units(mlps[0], mlp_layout(mlps[0])), torch.tensor([[3, 4, 5]])
    check_uniform(model)
    widen(mlps[0], mlp_layout(mlps[0]), HiddenUnits.zeros(3, hidden_of(mlps[0])))
    expected = model(ids).logits
    with pytest.raises(
        ValueError, match=rf"the MLPs of .* have the widths \[{n}, {n + 3}\] and its configuration says {field}"
    ):
        check_uniform(model)
    pad_to_widest(model)
    check_uniform(model)
    assert getattr(model.config, field) == n + 3
    assert [count_hidden_units(mlp, mlp_layout(mlp)) for mlp in mlps] == [n + 3] * len(mlps)
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_configuration_of_another_width_is_refused():
    model = tiny("llama")
    model.config.intermediate_size = 99
    with pytest.raises(ValueError, match=r"have the widths \[24\] and its configuration says intermediate_size = 99"):
        check_uniform(model)


def test_weights_that_are_no_plain_matrices_are_refused_by_the_name_of_the_layer():
    for name in ("gate_proj", "up_proj", "down_proj"):
        mlp = mlp_of("llama")
        layout = mlp_layout(mlp)
        check_widenable(mlp, layout)
        layer = getattr(mlp, name)
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
        with pytest.raises(
            ValueError, match=f"cannot be merged into `{name}` of LlamaMLP: it is a Linear with quantized"
        ):
            check_widenable(mlp, layout)
