"""Order of prompts: TRL's, and the same after resuming in any epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch alone, not on earlier iterations.

    TRL's sampler draws one permutation after another from its own generator. A run resumed in its second epoch would start
    with the first permutation, and see other prompts than an uninterrupted run. `Trainer` calls `set_epoch` at the
    beginning of every epoch, also when it resumes.

    >>> whole, resumed = (EpochSampler(range(8), 1, seed=0) for _ in range(2))
    >>> epochs = [list(whole) for whole.epoch in range(3)]
    >>> resumed.set_epoch(2)
    >>> list(resumed) == epochs[2] and epochs[2] != epochs[0]
    True
    """

    epoch = 0

    @classmethod
    def from_sampler(cls, sampler: RepeatSampler) -> EpochSampler:
        """Return an `EpochSampler` with the arguments of ``sampler``."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(*(getattr(sampler, name) for name in names))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of one epoch."""
        if self.shuffle:
            assert self.seed is not None, "TRL gives that of the arguments"
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()
