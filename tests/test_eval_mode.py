from __future__ import annotations

import pytest
from torch import nn

from routed_peft.eval_mode import evaluating


def test_every_module_gets_its_own_mode_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, True, False]
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with evaluating(model):
                assert not any(module.training for module in model.modules())
                if error is not None:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        assert [module.training for module in model.modules()] == before


def test_blocks_nest_and_errors_pass_through():
    model = nn.Dropout()
    with evaluating(model):
        with evaluating(model):
            pass
        assert not model.training
    assert model.training
    with pytest.raises(ValueError, match="mine"), evaluating(model):
        raise ValueError("mine")
