"""Where subspaces come from, how they are saved, and whether they are worth routing into."""

import json

import pytest
import torch
from families import tiny
from peft import get_peft_model
from places import ROOT
from safetensors.torch import load_file, save_file
from torch import nn

from routed_peft import RoutedConfig
from routed_peft.architectures import find_writers, layer_index
from routed_peft.data import train_tokenizer
from routed_peft.subspaces import (
    Subspace,
    contrastive_pca,
    difference_of_means,
    drift,
    energy_matched,
    haar,
    leak,
    sae_latents,
    tensor_file,
    validate,
    weight_change,
)
from routed_peft.subspaces.activations import covariance, response_means, writer_gradients
from routed_peft.subspaces.placebos import matched_directions

WORDS = ["tree", "stone", "river", "cloud", "grass", "light", "shade", "leaf", "bird", "hill"]
SHOUTED = [(f"Say {w}.", f" {w.upper()}!") for w in WORDS]
SPOKEN = [(f"Say {w}.", f" {w}.") for w in WORDS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], vocab_size=258)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=3)


def naive_means(model, tokenizer, conversations, layer) -> torch.Tensor:
    """One conversation at a time, and what the layer's own module returns."""
    caught = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, args, h: caught.append(h))
    rows = []
    for prompt, response in conversations:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(response, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([before + after]))
        rows.append(caught.pop()[0, len(before) :].mean(0))
    hook.remove()
    return torch.stack(rows)


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon"])
def test_response_means_of_every_family(family, tokenizer):
    model = tiny(family, vocab_size=300).train()
    means = response_means(model, tokenizer, conversations=SHOUTED[:3], layers=[0, 1], batch_size=2)
    assert model.training and {layer: tuple(m.shape) for layer, m in means.items()} == {0: (3, 16), 1: (3, 16)}
    alone = response_means(model, tokenizer, conversations=SHOUTED[2:3], layers=[1], batch_size=1)
    torch.testing.assert_close(means[1][2:], alone[1], rtol=0, atol=1e-5)  # padding does not show


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


def test_writer_gradients_equal_hooks_by_hand(model, tokenizer):
    got: dict[int, list[torch.Tensor]] = {}
    for layer, gradient in writer_gradients(model, tokenizer, conversations=SHOUTED[:1]):
        got.setdefault(layer, []).append(gradient)
    assert all(p.grad is None for p in model.parameters())
    frozen = tiny("llama", vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=3).requires_grad_(
        False
    )
    again = list(writer_gradients(frozen, tokenizer, conversations=SHOUTED[:1]))
    caught: list[tuple[int, torch.Tensor]] = []
    hooks = [
        writer.register_full_backward_hook(lambda _, gi, go, name=name: caught.append((layer_index(name), go[0][0])))
        for name, writer in find_writers(model).items()
    ]
    prompt, response = (tokenizer(text, add_special_tokens=i == 0)["input_ids"] for i, text in enumerate(SHOUTED[0]))
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    expected = sorted(caught[::-1], key=lambda item: item[0])
    assert len(expected) == len(again) == 6
    for (layer, gradient), reference, frozen_one in zip(
        expected, [g for i in sorted(got) for g in got[i]], again, strict=True
    ):
        torch.testing.assert_close(reference, gradient, rtol=0, atol=1e-5)
        assert frozen_one[0] == layer
        torch.testing.assert_close(frozen_one[1], gradient, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def planted(tokenizer):
    """A model that reads and writes capital letters along one direction."""
    model = tiny("llama", vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=3)
    direction = nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(3)), dim=0)
    capitals = [tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    with torch.no_grad():
        model.model.embed_tokens.weight[capitals] += 3 * direction
        model.lm_head.weight[capitals] += 10 * direction
    return model


def test_validation_tells_a_real_direction_from_noise(planted, tokenizer):
    held_out = SHOUTED[4:], SPOKEN[4:]
    real = difference_of_means(planted, tokenizer, positive=SHOUTED[:4], negative=SPOKEN[:4], layers=[1, 2])
    result = validate(real, planted, tokenizer=tokenizer, positive=held_out[0], negative=held_out[1])
    assert [at.layer for at in result.layers] == [1, 2] and result.texts == (6, 6)
    assert all(at.auroc == 1 and len(at.random_auroc) == len(at.random_energy) == 3 for at in result.layers)
    assert result.layers[1].energy > 2 * max(
        result.layers[1].random_energy
    )  # next to the head that reads the direction
    noise = validate(haar(real, 99), planted, tokenizer=tokenizer, positive=held_out[0], negative=held_out[1])
    assert all(at.energy < 0.1 for at in noise.layers) and not noise.ok
    assert any("below 0.8" in problem for problem in noise.problems)
    assert result.ok and not result.problems
    table = result.table()
    assert table.row_count == 2 and "1 of 64 directions, 6 + 6 held-out texts" in str(table.title)
    shared = difference_of_means(planted, tokenizer, positive=SHOUTED[:4], negative=SPOKEN[:4], layers=2)
    assert (
        validate(shared, planted, tokenizer=tokenizer, positive=held_out[0], negative=held_out[1]).layers[0].energy
        == result.layers[1].energy
    )


def test_validation_warns_of_a_subspace_too_large(model, tokenizer):
    large = haar(Subspace(torch.eye(64)[:, :6], {"measured_at": 1}), 0)
    result = validate(large, model, tokenizer=tokenizer, positive=SHOUTED, negative=SPOKEN, layers=[1])
    assert any("6 of 64 directions are more than 1/16" in problem for problem in result.problems)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positive": SHOUTED[:4]}, "5 texts a side at least are needed, got 4 and 10"),
        ({"seeds": (1, 1, 2)}, "at least 3 random subspaces"),
        ({"layers": [3]}, "`layers` must be among the decoder layers 0 … 2"),
        ({"layers": None}, "does not say where it was measured"),
    ],
)
def test_validation_refuses(arguments, message, model, tokenizer):
    fixed = {"positive": SHOUTED, "negative": SPOKEN, "layers": [1]}
    with pytest.raises(ValueError, match=message):
        validate(Subspace(torch.eye(64)[:, :1]), model, tokenizer=tokenizer, **(fixed | arguments))


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


def test_leak_and_drift():
    u = torch.linalg.qr(torch.randn(8, 2)).Q
    w0 = torch.randn(8, 5)
    along, across = u @ torch.randn(2, 5), torch.randn(8, 5)
    across -= u @ (u.T @ across)
    assert leak(w0 + along, w0, u) == pytest.approx(1)
    assert leak(w0 + across, w0, u) == pytest.approx(0, abs=1e-12)
    total = float(along.square().sum() + across.square().sum())
    assert leak(w0 + along + across, w0, u) == pytest.approx(float(along.square().sum()) / total, rel=1e-4)
    assert leak(w0, w0, u) == 0
    h = torch.randn(3, 8)
    assert drift(h, h, u) == 0 and drift(2 * h, h, u) == pytest.approx(1)
    assert drift(h + across[:, :1].T, h, u) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="not orthonormal"):
        leak(w0, w0, 2 * u)


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "subspaces.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python")[1].split("```")[0], {"__name__": "example"})
    assert sorted(p.name for p in (tmp_path / "run-subspace").iterdir() if p.is_dir()) == ["loudness"]
    assert (tmp_path / "run-subspace" / "model.safetensors").is_file()


def test_the_old_name_of_the_constructor_warns():
    directions = torch.eye(4)[:2]
    with pytest.warns(DeprecationWarning, match="from_directions"):
        old = Subspace.of(directions, source="by hand")
    assert torch.equal(old.bases, Subspace.from_directions(directions).bases)
