from __future__ import annotations

import random

from routed_peft.evaluation.relearning import (
    log_spaced,
)


def test_log_spaced_steps_end_where_they_should():
    assert log_spaced(500) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    for last in random.Random(0).sample(range(2000), 20):
        marks = log_spaced(last)
        assert marks == sorted(set(marks)) and marks[0] == 0 and marks[-1] == last
