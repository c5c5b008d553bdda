"""Simulation of missing and wrong labels, by a labeler of given recall and precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from datasets import Dataset

from routed_peft.data.columns import ROUTE_LABEL, column_values
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED


def simulate_labels(
    ds: Dataset,
    side_column: str = "side",
    *,
    labeled: float | Mapping[str, float] = 1.0,
    recall: float = 1.0,
    precision: float = 1.0,
    seed: int = 0,
) -> Dataset:
    r"""Add the column ``route_label`` to rows of known side, as an imperfect labeler would, with exact counts.

    Of the :math:`N_s` rows of side :math:`s`, :math:`n_s = [\ell_s N_s]` are labeled at all, with brackets for rounding; the
    rest are "unlabeled". Among those labeled,

    .. math::
        TP = [\text{recall} \cdot n_\text{forget}], \qquad
        FP = [TP \cdot (1 - \text{precision}) / \text{precision}],

    :math:`TP` true forget rows and :math:`FP` retain rows carry "forget", the other labeled rows "retain".

    The seed gives each side an order of its own, and every count takes rows from the front. So rows labeled at
    ``labeled=0.1`` are among those labeled at 0.5. As ``labeled`` or ``recall`` rises or ``precision`` falls, more rows carry
    "forget", and none of the former lose it.

    Args:
        ds: with the true side of each row, ``"forget"`` or ``"retain"``.
        side_column: name of the side's column.
        labeled: share of rows labeled at all, for both sides or by side.
        recall: share of labeled true forget rows that carry "forget", in [0, 1].
        precision: share of the rows carrying "forget" that truly are, in (0, 1].
        seed: same seed, same labels.

    Raises:
        ValueError: if a share is out of range, a side is neither of the two, or there are fewer labeled retain rows
            than the precision requires.

    >>> ds = Dataset.from_dict({"side": ["forget"] * 10 + ["retain"] * 20})
    >>> label_statistics(simulate_labels(ds, labeled={"forget": 0.8, "retain": 1.0}, recall=0.5, precision=0.8))
    {'forget': {'forget': 4, 'retain': 4, 'unlabeled': 2}, 'retain': {'forget': 1, 'retain': 19}}
    """
    shares = dict(labeled) if isinstance(labeled, Mapping) else {FORGET: labeled, RETAIN: labeled}
    if set(shares) != {FORGET, RETAIN}:
        raise ValueError(f"`labeled` is one share, or one each for 'forget' and 'retain', got {labeled}")
    given = {"recall": recall, "precision": precision} | {f"labeled[{side}]": v for side, v in shares.items()}
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is a share between 0 and 1, got {value}")
    if precision == 0:
        raise ValueError("`precision` must be above 0: at 0 the number of wrong rows is undefined")

    pools = {side: order[: round(shares[side] * len(order))] for side, order in _orders(ds, side_column, seed).items()}
    hits = round(recall * len(pools[FORGET]))
    wrong = round(hits * (1 - precision) / precision)
    if wrong > len(pools[RETAIN]):
        raise ValueError(f"`precision={precision}` beside {hits} forget rows found calls for {wrong} retain rows "
                         f"carrying 'forget', but only {len(pools[RETAIN])} retain rows are labeled")  # fmt: skip
    labels = np.full(len(ds), UNLABELED, dtype=object)
    for side, found in ((FORGET, hits), (RETAIN, wrong)):
        labels[pools[side]] = RETAIN
        labels[pools[side][:found]] = FORGET
    ds = ds.remove_columns(ROUTE_LABEL) if ROUTE_LABEL in ds.column_names else ds
    return ds.add_column(ROUTE_LABEL, labels.tolist())


def label_statistics(ds: Dataset, side_column: str = "side") -> dict[str, dict[str, int]]:
    """Count rows by true side and label.

    >>> label_statistics(Dataset.from_dict({"side": ["forget", "forget"], "route_label": ["forget", "unlabeled"]}))
    {'forget': {'forget': 1, 'unlabeled': 1}}
    """
    counts = Counter(zip(column_values(ds, side_column), column_values(ds, ROUTE_LABEL), strict=True))
    table: dict[str, dict[str, int]] = {}
    for (side, label), count in sorted(counts.items()):
        table.setdefault(side, {})[label] = count
    return table


def _orders(ds: Dataset, side_column: str, seed: int) -> dict[str, np.ndarray]:
    sides = np.array(column_values(ds, side_column), dtype=object)
    if other := {side for side in set(sides) if side not in (FORGET, RETAIN)}:
        raise ValueError(f"the column `{side_column}` holds 'forget' and 'retain', got {sorted(map(str, other))} as "
                         "well")  # fmt: skip
    return {
        side: np.random.default_rng([seed, i]).permutation(np.flatnonzero(sides == side))
        for i, side in enumerate((FORGET, RETAIN))
    }
