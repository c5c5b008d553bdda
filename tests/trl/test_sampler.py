from __future__ import annotations

from trl.trainer.utils import RepeatSampler

from routed_peft.trl.sampling import EpochSampler

ARGUMENTS = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5}


def epochs_of(sampler: RepeatSampler, count: int) -> list[list[int]]:
    """Return the order of each epoch, one after another, as `Trainer` goes through them."""
    orders = []
    for epoch in range(count):
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(epoch)
        orders.append(list(sampler))
    return orders


def test_a_whole_run_has_the_orders_of_trl():
    data = range(9)
    found, expected = (epochs_of(kind(data, **ARGUMENTS), 4) for kind in (EpochSampler, RepeatSampler))
    assert found == expected and len({tuple(order) for order in found}) == 4
    assert len(found[0]) == len(EpochSampler(data, **ARGUMENTS)) == 9 * 2 * 2


def test_a_run_that_resumes_in_any_epoch_goes_on_with_its_order():
    whole = epochs_of(EpochSampler(range(9), **ARGUMENTS), 4)
    for epoch in range(4):
        resumed = EpochSampler.from_sampler(RepeatSampler(range(9), **ARGUMENTS))
        resumed.set_epoch(epoch)
        assert list(resumed) == whole[epoch] == list(resumed), "and the same when it is asked again"


def test_rows_in_order_stay_in_order():
    sampler = EpochSampler.from_sampler(RepeatSampler(range(6), 1, batch_size=2, shuffle=False))
    sampler.set_epoch(3)
    assert list(sampler) == list(range(6))
