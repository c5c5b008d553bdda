"""Fixtures of the tests of `routed_peft.training`."""

from __future__ import annotations

import pytest

from routed_peft.data import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["a"], vocab_size=258)
