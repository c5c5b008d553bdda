from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from routed_peft.subspaces import (
    Subspace,
)


def test_a_subspace_survives_saving(tmp_path):
    for bases in (torch.linalg.qr(torch.randn(8, 3)).Q, {2: torch.eye(8)[:, :2], 0: torch.eye(8)[:, 3:5]}):
        subspace = Subspace(bases, {"source": "test", "seed": 3})
        loaded = Subspace.load(subspace.save(tmp_path / "deep" / "u.safetensors"))
        assert loaded.provenance == subspace.provenance and loaded.sha256 == subspace.sha256
        assert loaded.layers == subspace.layers and (loaded.width, loaded.k) == (subspace.width, subspace.k)
        assert all(torch.equal(loaded.at(layer), subspace.at(layer)) for layer in subspace.layers or [0, 7])
        assert [f.name for f in (tmp_path / "deep").iterdir()] == ["u.safetensors"]
    assert sorted(load_file(tmp_path / "deep" / "u.safetensors")) == ["U.0", "U.2"]


def test_damaged_and_foreign_files(tmp_path):
    path = Subspace(torch.eye(8)[:, :2]).save(tmp_path / "u.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        Subspace.load(path)
    path.write_bytes(good[:-4] + torch.tensor([1e-5]).numpy().tobytes())  # still orthonormal to the tolerance
    with pytest.raises(ValueError, match="differ from the saved ones"):
        Subspace.load(path)
    save_file({"U": torch.eye(8)[:, :2].contiguous()}, path)
    with pytest.raises(ValueError, match=r"is not a subspace file: it holds \['U'\] and no provenance"):
        Subspace.load(path)


@pytest.mark.parametrize(
    ("bases", "message"),
    [
        (torch.ones(4, 2), "`U` is not orthonormal"),
        (torch.eye(4), "has 4 directions in a residual stream of width 4"),
        (torch.zeros(4, 0), "has 0 directions"),
        (torch.eye(4)[0], r"must be a floating-point matrix \(d, k\)"),
        (torch.full((4, 1), float("nan")), "`U` is not orthonormal"),
        ({0: torch.eye(4)[:, :1], 1: torch.eye(4)[:, :2]}, r"must have one shape \(d, k\)"),
        ({1: torch.ones(4, 1)}, "`U.1` is not orthonormal"),
        ({}, "`bases` is empty"),
    ],
)
def test_what_is_no_basis(bases, message):
    with pytest.raises(ValueError, match=message):
        Subspace(bases)


def test_the_old_name_of_the_constructor_warns():
    directions = torch.eye(4)[:2]
    with pytest.warns(DeprecationWarning, match="from_directions"):
        old = Subspace.of(directions, source="by hand")
    assert torch.equal(old.bases, Subspace.from_directions(directions).bases)
