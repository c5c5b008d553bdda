from __future__ import annotations

import pytest
import torch
from conversation_parts import SHOUTED, SPOKEN
from places import ROOT

from routed_peft.subspaces import (
    Subspace,
    difference_of_means,
    haar,
    validate,
)


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


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "subspaces.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python")[1].split("```")[0], {"__name__": "example"})
    assert sorted(p.name for p in (tmp_path / "run-subspace").iterdir() if p.is_dir()) == ["loudness"]
    assert (tmp_path / "run-subspace" / "model.safetensors").is_file()
