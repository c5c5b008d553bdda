"""Schedule of a run: packed rows in training order, with chosen shares of labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from datasets import Dataset

from routed_peft.data.columns import ROUTE_LABEL, column_values
from routed_peft.data.labels import FORGET, UNLABELED


def schedule(
    ds: Dataset,
    rows: int,
    *,
    labeled_first: float = 0.0,
    forget_share: float | None = None,
    seed: int = 0,
    first_forget_share: float = 0.5,
) -> Dataset:
    r"""Lay out a run of exactly ``rows`` rows, for ``train_sampling_strategy="sequential"``.

    At first only labeled rows come, so that the region knows its side before unlabeled rows, which train base and region
    alike. The rest of the run takes all labels in their shares of ``ds``, but for ``forget_share``: labeled forget rows teach
    the base nothing, so a smaller share of them leaves more of the budget to the others. Any stretch has the shares of its
    phase to within one row, so batches are alike. The rows of a label are shuffled, and again each time they are used up.

    Args:
        ds: rows with ``route_label``.
        rows: length of the run: steps times rows per step.
        labeled_first: share of the run that takes labeled rows only, in [0, 1].
        forget_share: share of labeled forget rows in the rest, in [0, 1); None for the share in ``ds``.
        seed: same seed, same run.
        first_forget_share: share of forget rows in the labeled start, in (0, 1).

    Raises:
        ValueError: if a share is out of range, or ``labeled_first`` is above 0 and labeled rows of either kind are missing.

    >>> ds = Dataset.from_dict({"route_label": ["forget", "retain", "unlabeled", "unlabeled"]})
    >>> schedule(ds, 8, labeled_first=0.5, forget_share=0.0)["route_label"][:4]
    ['forget', 'retain', 'forget', 'retain']
    """
    shares = {"labeled_first": labeled_first, "forget_share": forget_share, "first_forget_share": first_forget_share}
    return ds.select(draw_order(column_values(ds, ROUTE_LABEL), rows, seed=seed, **shares))  # type: ignore[arg-type]


def draw_order(
    row_labels: Sequence[str],
    rows: int,
    *,
    labeled_first: float = 0.0,
    forget_share: float | None = None,
    seed: int | Sequence[int] = 0,
    first_forget_share: float = 0.5,
    regions: Sequence[str] = (FORGET,),
) -> list[int]:
    """Return the indices that `schedule` selects from rows with these labels; its arguments are those of `schedule`.

    Rows with a label among ``regions`` are the forget rows, and each label has its part of their share.

    >>> labels = ["bio", "cyber", "retain", "retain"]
    >>> [labels[i] for i in draw_order(labels, 8, forget_share=0.25, regions=["bio", "cyber"])].count("bio")
    1
    """
    if rows < 1 or not 0 <= labeled_first <= 1:
        raise ValueError(f"`rows` must be positive and `labeled_first` in [0, 1], got {rows} and {labeled_first}")
    if forget_share is not None and not 0 <= forget_share < 1:
        raise ValueError(f"`forget_share` must be in [0, 1) or None, got {forget_share}")
    if not 0 < first_forget_share < 1:
        raise ValueError(f"`first_forget_share` must be between 0 and 1, got {first_forget_share}")
    labels = np.array(row_labels)
    pools = {str(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    first = round(labeled_first * rows)
    shares = {label: len(pool) / len(labels) for label, pool in pools.items()}
    if forget_share is not None:
        rest = {label: share for label, share in shares.items() if label not in regions}
        own = {label: shares[label] for label in regions if label in shares}
        if not rest or (forget_share and not own):
            raise ValueError(f"`forget_share` is {forget_share}, but the data has only the labels {list(shares)}")
        shares = {label: share / sum(rest.values()) * (1 - forget_share) for label, share in rest.items()}
        shares |= {label: forget_share * (share / sum(own.values())) for label, share in own.items()}
    order = _mixed(shares, rows - first)
    if first:
        others = {label: share for label, share in shares.items() if label not in (*regions, UNLABELED)}
        if not others or not set(regions) <= set(pools):
            needed = ", ".join(regions)
            raise ValueError(
                f"`labeled_first` needs rows labeled {needed} and rows labeled otherwise, got {list(pools)}"
            )
        counts = {label: len(pools[label]) for label in regions}
        own = {label: first_forget_share * (count / sum(counts.values())) for label, count in counts.items()}
        part = (1 - first_forget_share) / sum(others.values())
        others = {label: share * part for label, share in others.items()}
        order = _mixed(own | others, first) + order
    seeds = [seed] if isinstance(seed, int) else list(seed)
    draws = {label: _draw(pool, np.random.default_rng([*seeds, i])) for i, (label, pool) in enumerate(pools.items())}
    return [int(next(draws[label])) for label in order]


def _mixed(shares: Mapping[str, float], count: int) -> list[str]:
    """Return ``count`` labels with the shares in every stretch: the label that lags most comes next."""
    owed = dict.fromkeys(shares, 0.0)
    order = []
    for _ in range(count):
        for label, share in shares.items():
            owed[label] += share
        label = max(owed, key=owed.__getitem__)
        owed[label] -= 1
        order.append(label)
    return order


def _draw(pool: Sequence[int] | np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(pool)
