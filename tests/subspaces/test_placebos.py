from __future__ import annotations

import pytest
import torch
from conversation_parts import SHOUTED, SPOKEN, WORDS

from routed_peft.subspaces import (
    Subspace,
    difference_of_means,
    energy_matched,
    haar,
)
from routed_peft.subspaces.activations import covariance
from routed_peft.subspaces.validation import matched_directions


def test_haar_is_uniform_and_seeded():
    like = Subspace({0: torch.eye(16)[:, :2], 3: torch.eye(16)[:, 2:4]}, {"source": "test"})
    first = haar(like, 0)
    assert first.layers == [0, 3] and first.sha256 == haar(like, 0).sha256 != haar(like, 1).sha256
    assert not torch.equal(first.at(0), first.at(3))
    shares = torch.stack([haar(like, seed).at(0).square().sum(1) for seed in range(200)])
    assert shares.mean(0).sub(2 / 16).abs().max() < 0.04 and float(haar(like, 5).at(0).sum()) != 0


def test_energy_matched_placebos_hold_as_much_of_generic_activations(model, tokenizer):
    like = difference_of_means(model, tokenizer, positive=SHOUTED, negative=SPOKEN, layers=2)
    generic = [("", f"the {w} and the {v}") for w, v in zip(WORDS, WORDS[1:], strict=False)]
    moment = covariance(model, tokenizer, conversations=generic, layer=2)
    held = lambda u: float(torch.einsum("dk,de,ek->", u.double(), moment, u.double()) / moment.trace())
    placebo = energy_matched(like, model, tokenizer=tokenizer, texts=generic, seed=1)
    assert held(placebo.at(0)) == pytest.approx(held(like.at(0)), rel=1e-3)
    other = energy_matched(like, model, tokenizer=tokenizer, texts=generic, seed=2)
    assert held(other.at(0)) == pytest.approx(held(like.at(0)), rel=1e-3) and other.sha256 != placebo.sha256
    with pytest.raises(ValueError, match="does not say where it was measured: give `layer`"):
        energy_matched(Subspace(like.bases), model, tokenizer=tokenizer, texts=generic, seed=1)


def test_matched_directions_beyond_the_spectrum():
    moment = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0]))
    v = matched_directions(torch.eye(4)[:, [0, 3]], moment, torch.Generator().manual_seed(0))
    torch.testing.assert_close(v.T @ v, torch.eye(2), rtol=0, atol=1e-6)
    torch.testing.assert_close((v.T @ moment @ v).diagonal(), torch.tensor([5.0, 1.0]), rtol=0, atol=1e-5)
