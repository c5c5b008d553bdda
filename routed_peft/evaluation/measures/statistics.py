"""Uncertainty of a number: over seeds, and over the documents that it was measured on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from routed_peft.deprecation import formerly_positional, warn_renamed
from routed_peft.evaluation.text_loss import TextLoss


@dataclass(frozen=True)
class Spread:
    """A number over seeds: mean, least, greatest, and how many there are."""

    mean: float
    min: float
    max: float
    n: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Sum up values, at least one.

        >>> Spread.from_values([2.0, 4.0])
        Spread(mean=3.0, min=2.0, max=4.0, n=2)
        """
        if not values:
            raise ValueError("a spread needs at least one value, got none")
        return cls(statistics.fmean(values), min(values), max(values), len(values))

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Call `from_values`, under its former name."""
        warn_renamed("Spread.of", "Spread.from_values")
        return cls.from_values(values)

    def as_dict(self) -> dict[str, float]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.min:.2f}–{self.max:.2f})"


@formerly_positional("other", "level", "draws", "seed")
def bootstrap(
    sums: Sequence[float] | Tensor,
    counts: Sequence[float] | Tensor,
    *,
    other: Sequence[float] | Tensor | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Return a confidence interval, over documents, of a loss per token or of a difference of two, in nats per token.

    .. math:: L^{(b)} = \frac{\sum_{d \in D_b} \ell_d}{\sum_{d \in D_b} n_d}

    over samples :math:`D_b` of as many documents, drawn with replacement; the interval is that of the percentiles (Efron 1979).
    It covers other documents of the same kind, and not other seeds.

    Args:
        sums: :math:`\ell_d`, each document's loss in nats (`TextLoss.documents`).
        counts: :math:`n_d`, its tokens (`TextLoss.counts`).
        other: sums of another model on the same documents, to subtract; pairs are drawn together.
        seed: of the draws; global generators are not used.

    Raises:
        ValueError: on fewer than two documents, unequal lengths, or a level that is no share.

    >>> low, high = bootstrap([10.0, 30.0, 20.0, 20.0], [10, 10, 10, 10])
    >>> 1.0 <= low < 2.0 < high <= 3.0
    True
    """
    losses, tokens = torch.as_tensor(sums, dtype=torch.float64), torch.as_tensor(counts, dtype=torch.float64)
    if other is not None:
        losses = losses - torch.as_tensor(other, dtype=torch.float64)
    if losses.shape != tokens.shape or losses.dim() != 1 or len(losses) < 2 or not 0 < level < 1:
        raise ValueError("a bootstrap needs one sum and one count for each of at least two documents, and a `level` "
                         f"between 0 and 1; got {tuple(losses.shape)}, {tuple(tokens.shape)} and {level}")  # fmt: skip
    losses, tokens = losses.cpu(), tokens.cpu()
    generator = torch.Generator().manual_seed(seed)
    means: list[Tensor] = []
    while len(means) < draws:  # one by one: all at once would take draws times documents of memory
        drawn = torch.randint(len(losses), (len(losses),), generator=generator)
        means.append(losses[drawn].sum() / tokens[drawn].sum())
    tail = (1 - level) / 2
    low, high = torch.stack(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def with_interval(loss: TextLoss, model: nn.Module) -> tuple[float, tuple[float, float] | None]:
    """Return a model's loss, and its `bootstrap` over documents, which is None for a single document."""
    sums = loss.documents(model)
    return float(sums.sum() / loss.counts.sum()), bootstrap(sums, loss.counts) if len(sums) > 1 else None
