from __future__ import annotations

import json

import pytest
import torch
from conversation_parts import SHOUTED, SPOKEN, naive_means
from families import tiny
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from routed_peft import RoutedConfig
from routed_peft.architectures import find_writers
from routed_peft.subspaces import (
    Subspace,
    contrastive_pca,
    difference_of_means,
    sae_latents,
    tensor_file,
    weight_change,
)


def test_difference_of_means_and_pca_are_what_they_say(model, tokenizer, tmp_path):
    naive = naive_means(model, tokenizer, SHOUTED, 1), naive_means(model, tokenizer, SPOKEN, 1)
    shared = difference_of_means(model, tokenizer, positive=SHOUTED, negative=SPOKEN[:7], layers=1)
    expected = nn.functional.normalize(naive[0].mean(0) - naive[1][:7].mean(0), dim=0)
    assert shared.layers is None and shared.provenance["measured_at"] == 1 and shared.k == 1
    assert abs(float(shared.at(5)[:, 0] @ expected)) == pytest.approx(1, abs=1e-5)

    pca = contrastive_pca(model, tokenizer, positive=SHOUTED, negative=SPOKEN, layers=[0, 1], k=2)
    u, s, _ = torch.linalg.svd((naive[0] - naive[1]).T, full_matrices=False)
    projector = u[:, :2] @ u[:, :2].T
    torch.testing.assert_close(pca.at(1) @ pca.at(1).T, projector, rtol=0, atol=1e-4)
    energy = (s[:2].square().sum() / s.square().sum()).item()
    assert pca.layers == [0, 1] and pca.provenance["energy"]["1"] == pytest.approx(energy, abs=1e-5)
    region = RoutedConfig(
        kind="subspace", subspace=str(pca.save(tmp_path / "pca.safetensors")), layers_to_transform=[0, 1]
    )
    wrapped = get_peft_model(tiny("llama", hidden_size=64), region, "persona")
    assert wrapped.peft_config["persona"].provenance["source"] == "contrastive_pca"


def test_sae_latents_are_read_by_row(tmp_path):
    decoder = torch.randn(20, 8)
    save_file({"W_dec": decoder, "W_enc": torch.zeros(8, 20)}, tmp_path / "sae_weights.safetensors")

    def read(hook: str, latents=(3, 11), nested: bool = True) -> Subspace:
        cfg = {"hook_name": hook, "model_name": "gemma"}
        cfg = {"normalize_activations": "none", "metadata": cfg} if nested else cfg
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        return sae_latents(tmp_path, latents)

    subspace = read("blocks.4.hook_resid_post")
    torch.testing.assert_close(
        subspace.at(0) @ subspace.at(0).T @ decoder[[3, 11]].T, decoder[[3, 11]].T, rtol=0, atol=1e-5
    )
    assert subspace.provenance["measured_at"] == 4 and subspace.provenance["latents"] == [3, 11]
    assert subspace.provenance["model"] == "gemma"
    assert read("blocks.4.hook_resid_pre", nested=False).provenance["measured_at"] == 3
    assert read("model.layers.6").provenance["measured_at"] == 6
    with pytest.raises(ValueError, match="trained at 'blocks.4.attn.hook_z', which is not the residual stream"):
        read("blocks.4.attn.hook_z")
    with pytest.raises(ValueError, match="`latents` must be ids from 0 to 19"):
        read("blocks.4.hook_resid_post", [20])
    save_file({"decoder": decoder}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="no tensor `W_dec`"):
        read("blocks.4.hook_resid_post")
    with pytest.raises(ValueError, match="has no cfg.json"):
        sae_latents(tmp_path / "none", [1])


def test_published_vectors(tmp_path):
    first, second = torch.randn(5, 8), torch.randn(5, 8)
    torch.save(first, tmp_path / "evil.pt")
    save_file({"axis": second, "other": second[:1].clone()}, tmp_path / "axis.safetensors")
    one = tensor_file(tmp_path / "evil.pt", layers=2, rows="hidden_states", model="org/model")
    assert abs(float(one.at(0)[:, 0] @ nn.functional.normalize(first[3], dim=0))) == pytest.approx(1, abs=1e-5)
    assert one.provenance["model"] == "org/model" and one.provenance["files"] == ["evil.pt"]
    assert tensor_file(tmp_path / "evil.pt", None, rows="hidden_states").layers == [0, 1, 2, 3]
    save_file({"axis": second}, tmp_path / "second.safetensors")
    both = tensor_file([tmp_path / "evil.pt", tmp_path / "second.safetensors"], layers=[0, 4])
    assert (both.k, both.layers) == (2, [0, 4])
    torch.testing.assert_close(both.at(4) @ both.at(4).T @ first[4], first[4], rtol=0, atol=1e-5)
    torch.save({"a": torch.randn(8)}, tmp_path / "flat.pt")
    assert tensor_file(tmp_path / "flat.pt", layers=3).provenance["measured_at"] == 3


class Malice:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (
            {"a": torch.ones(3, 4), "b": torch.ones(3, 4)},
            {"layers": 0},
            r"holds \['a', 'b'\]: name one of them as `key`",
        ),
        (torch.ones(3, 4), {"layers": 3}, "`layers` must be from 0 to 2"),
        (torch.ones(3, 4), {"layers": 2, "rows": "hidden_states"}, "`layers` must be from 0 to 1"),
        (torch.ones(3, 4), {"layers": 0, "rows": "both"}, "`rows` is"),
        (torch.ones(4), {"layers": None}, "give the one that they were measured at"),
        (torch.ones(2, 3, 4), {"layers": 0}, r"must hold a tensor \(n_layers, d\)"),
    ],
)
def test_tensor_files_that_cannot_be_read(content, arguments, message, tmp_path):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=message):
        tensor_file(tmp_path / "v.pt", **arguments)
    with pytest.raises(ValueError, match="there is no file"):
        tensor_file(tmp_path / "none.pt", layers=0)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save(Malice(), tmp_path / "v.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        tensor_file(tmp_path / "v.pt", layers=0)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_change_finds_what_was_planted(family, tmp_path):
    before, after = tiny(family), tiny(family)
    u = torch.linalg.qr(torch.randn(16, 2)).Q
    for writer in find_writers(after).values():
        change = u @ torch.randn(2, writer.weight.shape[1 if family == "llama" else 0])
        writer.weight.data += change if family == "llama" else change.T
    before.save_pretrained(tmp_path / "before")
    found = weight_change(tmp_path / "before", after, k=2)
    assert found.layers == [0, 1] and found.provenance["energy"]["0"] > 0.999
    torch.testing.assert_close(found.at(1) @ found.at(1).T, u @ u.T, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="differences in fewer than `k` = 3 directions"):
        weight_change(before, after, k=3)
    with pytest.raises(ValueError, match="have different residual writers"):
        weight_change(before, tiny(family, num_hidden_layers=1) if family == "llama" else tiny(family, n_layer=1), k=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m, t: difference_of_means(m, t, positive=SHOUTED, negative=SPOKEN, layers=7),
            "`layers` must be among the decoder layers",
        ),
        (
            lambda m, t: difference_of_means(m, t, positive=[("a", "")], negative=SPOKEN, layers=1),
            "conversation 0 has an empty response",
        ),
        (lambda m, t: difference_of_means(m, t, positive=[], negative=SPOKEN, layers=1), "no conversations were given"),
        (
            lambda m, t: contrastive_pca(m, t, positive=SHOUTED, negative=SPOKEN[:3], layers=1, k=1),
            "must be pairs, got 10 and 3",
        ),
        (
            lambda m, t: contrastive_pca(m, t, positive=SHOUTED, negative=SPOKEN, layers=1, k=11),
            "from 1 to the number of pairs, 10",
        ),
    ],
)
def test_sources_refuse(make, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        make(model, tokenizer)
