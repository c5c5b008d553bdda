from __future__ import annotations

import pytest
import torch
from conversation_parts import SHOUTED
from families import tiny
from torch import nn

from routed_peft.architectures import find_writers, layer_index
from routed_peft.subspaces.activations import response_means, writer_gradients


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon"])
def test_response_means_of_every_family(family, tokenizer):
    model = tiny(family, vocab_size=300).train()
    means = response_means(model, tokenizer, conversations=SHOUTED[:3], layers=[0, 1], batch_size=2)
    assert model.training and {layer: tuple(m.shape) for layer, m in means.items()} == {0: (3, 16), 1: (3, 16)}
    alone = response_means(model, tokenizer, conversations=SHOUTED[2:3], layers=[1], batch_size=1)
    torch.testing.assert_close(means[1][2:], alone[1], rtol=0, atol=1e-5)  # padding does not show


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
