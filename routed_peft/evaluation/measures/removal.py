"""Removal, its retain tax and its leakage, from the losses of models that were trained side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from routed_peft.deprecation import formerly_positional, warn_renamed
from routed_peft.evaluation.measures.crossing import Crossing, crossing

_OPPOSITE: dict[str, Literal["=", ">", "<"]] = {"=": "=", ">": "<", "<": ">"}


def removed(ablated: float, dense: float, perfect: float) -> float:
    r"""Return the share of the forget knowledge that a model lacks once its region is ablated.

    .. math:: \text{removed} = \frac{L_\text{ablated} - L_\text{dense}}{L_\text{perfect} - L_\text{dense}}

    with L the loss on held-out forget text, in nats per token: of the routed model with its region ablated, of the same model
    trained without routing (a share of 0), and of the perfect filter, which saw no forget rows (1). NaN where nothing can be
    removed. More than 1 is possible and no better: such a model is surer of wrong tokens than one that never learned. The
    definition is this library's (docs/design.md, "What a claim needs"); UNDO (arXiv 2506.06278) scales between the same models.

    >>> removed(5.0, dense=3.0, perfect=6.0), removed(5.0, dense=3.0, perfect=3.0)
    (0.6666666666666666, nan)
    """
    distance = perfect - dense
    return (ablated - dense) / distance if distance > 0 else math.nan


def recovered(ablated: float, on: float, dense: float) -> float:
    r"""Return the share of what was removed that the region gives back where it is switched on.

    .. math:: \text{recovered} = \frac{L_\text{ablated} - L_\text{on}}{L_\text{ablated} - L_\text{dense}}

    with L the loss on held-out forget text, in nats per token. 1 is a model that is as good with its region as the same model
    trained without routing; NaN where nothing was removed. What an attacker brings back is `share_relearned`.

    >>> recovered(5.0, on=3.5, dense=3.0)
    0.75
    """
    distance = ablated - dense
    return (ablated - on) / distance if distance > 0 else math.nan


def retain_tax(ablated: float, filtered: float) -> float:
    r"""Return the cost of a removal on retain text, in nats per token.

    .. math:: \text{retain tax} = L_\text{ablated} - L_\text{filtered}

    with L the loss on held-out retain text; against the perfect filter, or, where that is said, against the filter with the
    same labels. SGTM (arXiv 2512.05648) draws the same trade-off as retain loss against forget loss.

    >>> retain_tax(3.75, filtered=3.5)
    0.25
    """
    return ablated - filtered


def way(routed: float, unrouted: float, perfect: float) -> float:
    """Call `removed`, under its former name."""
    warn_renamed("routed_peft.evaluation.measures.way", "removed")
    return removed(routed, unrouted, perfect)


def tax(routed: float, filtered: float) -> float:
    """Call `retain_tax`, under its former name."""
    warn_renamed("routed_peft.evaluation.measures.tax", "retain_tax")
    return retain_tax(routed, filtered)


def tokens_of_plain(loss: float, tokens: Sequence[float], losses: Sequence[float]) -> Crossing:
    r"""Return how many tokens the plain model needs for a loss in nats, read off its training curve log-linearly.

    The T_plain of `compute_penalty` and the n of `leakage` (SGTM, arXiv 2512.05648; interpolating in the logarithm of tokens is
    this library's choice). ``losses`` are those after ``tokens``, ascending and positive, on the same held-out text. The first
    crossing counts. A loss beyond the curve is censored (``> `` its last tokens, ``< `` its first).

    >>> print(tokens_of_plain(3.5, tokens=[1e6, 2e6, 4e6], losses=[5.0, 4.0, 3.0]))
    2.828e+06
    """
    return crossing(tokens, losses, target=loss, log=True)


@formerly_positional("tokens", "losses")
def compute_penalty(loss: float, trained: float, *, tokens: Sequence[float], losses: Sequence[float]) -> Crossing:
    r"""Return the share of its training that a model has lost, measured by retain loss.

    .. math:: \text{penalty} = 1 - \frac{T_\text{plain}(L)}{T}

    with L its retain loss (``loss``), T the tokens that it was trained on (``trained``), and :math:`T_\text{plain}(L)` the
    tokens after which the plain model has that loss: `tokens_of_plain`. 0 is no cost, below 0 a gain; beyond the plain model's
    curve only a bound is known. SGTM (arXiv 2512.05648) reports 5 % on general text at 254M parameters; for forget text it
    should be near 1.

    >>> compute_penalty(4.0, trained=4e6, tokens=[1e6, 2e6, 4e6], losses=[5.0, 4.0, 3.0]).at
    0.5
    >>> print(compute_penalty(6.0, trained=4e6, tokens=[1e6, 2e6, 4e6], losses=[5.0, 4.0, 3.0]))
    > 0.75
    """
    if trained <= 0:
        raise ValueError(f"`trained` must be a positive number of tokens, got {trained}")
    needed = tokens_of_plain(loss, tokens, losses)
    return Crossing(1 - needed.at / trained, _OPPOSITE[needed.relation])


@formerly_positional("tokens", "losses")
def leakage(loss: float, unlabeled: float, *, tokens: Sequence[float], losses: Sequence[float]) -> Crossing:
    r"""Return the share of the unlabeled forget data that has taught the ablated model, as SGTM defines it.

    .. math:: \text{leakage} = \frac{n(L)}{u}

    with u (``unlabeled``) the unlabeled forget tokens that the model was trained on, L (``loss``) its forget loss with the
    region ablated, and n(L) the forget tokens, among the same retain text, from which plain training has that loss; ``tokens``
    and ``losses`` are of several plain runs, tokens ascending. 1 is what filtering leaks; SGTM finds 0.005 to 0.02 at 64M
    parameters (arXiv 2512.05648, section on leakage). Censored where the runs do not cover the loss.

    >>> print(leakage(4.0, unlabeled=1e6, tokens=[1e3, 1e5], losses=[5.0, 3.0]))
    0.01
    >>> leakage(6.0, unlabeled=1e6, tokens=[1e3, 1e5], losses=[5.0, 3.0])
    Crossing(at=0.001, relation='<')
    """
    if unlabeled <= 0:
        raise ValueError(f"`unlabeled` must be a positive number of tokens, got {unlabeled}: without any, nothing can "
                         "leak")  # fmt: skip
    needed = tokens_of_plain(loss, tokens, losses)
    return Crossing(needed.at / unlabeled, needed.relation)


def absorption(loss: float, filtered: float, perfect: float) -> float:
    r"""Return the share of the unlabeled forget data that the ablated model lacks, as it lacks the labeled.

    .. math:: \text{absorption} = \frac{L - L_\text{filter}}{L_\text{perfect} - L_\text{filter}}

    with L the loss on held-out forget text, in nats per token: 0 for the filter with the same labels, 1 where unlabeled forget
    data is missing as if it had been filtered. The phenomenon is that of gradient routing (arXiv 2410.04332, section 4.2); the
    formula is this library's. NaN where there is nothing to absorb.

    >>> absorption(5.25, filtered=4.5, perfect=6.0)
    0.5
    """
    return removed(loss, filtered, perfect)
