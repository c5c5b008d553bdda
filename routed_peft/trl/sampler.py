"""The order of prompts: that of TRL, and the same after resuming in any epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """`trl`'s sampler, whose order depends on the epoch alone, not on how often it was asked before.

    TRL's draws one permutation after another from a generator of its own. A run that is resumed in its second epoch starts
    with that of the first, so it would see other prompts than the run that was not interrupted. `Trainer` calls `set_epoch`
    at the beginning of every epoch, also when it resumes.

    Example:
        >>> whole, resumed = (EpochSampler(range(8), 1, seed=0) for _ in range(2))
        >>> epochs = [list(whole) for whole.epoch in range(3)]
        >>> resumed.set_epoch(2)
        >>> list(resumed) == epochs[2] and epochs[2] != epochs[0]
        True
    """

    epoch = 0

    @classmethod
    def like(cls, sampler: RepeatSampler) -> EpochSampler:
        """Return one with the arguments of ``sampler``."""
        return cls(
            sampler.data_source,
            sampler.mini_repeat_count,
            sampler.batch_size,
            sampler.repeat_count,
            sampler.shuffle,
            sampler.seed,
        )

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration give the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Return the indices of one epoch."""
        if self.shuffle:
            assert self.seed is not None, "TRL gives that of the arguments"
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
