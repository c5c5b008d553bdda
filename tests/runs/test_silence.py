"""Libraries are silent within a block, and as before after it."""

from __future__ import annotations

import logging
import warnings

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from routed_peft.runs.silence import silenced_libraries


def state() -> tuple[object, ...]:
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    return transformers_logging.get_verbosity(), logging.getLogger("lm_eval").level, *bars


def test_libraries_are_silent_and_speak_again():
    before = state()
    with pytest.raises(KeyError), silenced_libraries():
        assert state() == (logging.ERROR, logging.ERROR, False, True)
        warnings.warn("not shown", UserWarning, stacklevel=1)  # the tests' filter would make it an error
        raise KeyError
    assert state() == before
