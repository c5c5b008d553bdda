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

    with L the loss on held-out forget text, in nats per token: of the routed model with its region ablated, of the same
    model trained on the same data without routing (a share of 0), and of the perfect filter, which saw no forget rows (1).
    NaN where the perfect filter's loss is not above the dense model's, so that nothing can be removed. More than 1 is
    possible and no better: such a model is surer of wrong tokens than one that never learned. Losses after relearning can
    be compared by the same formula. The definition is this library's (docs/design.md, "What a claim needs"); UNDO (arXiv
    2506.06278) scales its robustness between the same two models.

    >>> removed(5.0, dense=3.0, perfect=6.0)
    0.6666666666666666
    >>> removed(5.0, dense=3.0, perfect=3.0)
    nan
    """
    distance = perfect - dense
    return (ablated - dense) / distance if distance > 0 else math.nan


def recovered(ablated: float, on: float, dense: float) -> float:
    r"""Return the share of what was removed that the region gives back where it is switched on.

    .. math:: \text{recovered} = \frac{L_\text{ablated} - L_\text{on}}{L_\text{ablated} - L_\text{dense}}

    with L the loss on held-out forget text, in nats per token. 1 is a model that is as good with its region as one that was
    never routed, measured against the same model trained without routing. The definition is this library's
    (docs/design.md, "What a claim needs"). What an attacker brings back is
    measured by `share_relearned`. NaN where nothing was removed.

    >>> recovered(5.0, on=3.5, dense=3.0)
    0.75
    """
    distance = ablated - dense
    return (ablated - on) / distance if distance > 0 else math.nan


def retain_tax(ablated: float, filtered: float) -> float:
    r"""Return the cost of a removal on retain text, in nats per token.

    .. math:: \text{retain tax} = L_\text{ablated} - L_\text{filtered}

    with L the loss on held-out retain text. It is taken against the perfect filter, or, where that is said, against the
    filter with the same labels. This library's definition (docs/design.md, "What a claim needs"); SGTM (arXiv 2512.05648)
    draws the same trade-off as retain loss against forget loss.

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

    The T_plain of `compute_penalty` and the n of `leakage`, for both of which SGTM (arXiv 2512.05648) reads the losses of
    plain models backwards; interpolating in the logarithm of tokens is this library's choice. ``losses`` are those after
    ``tokens``, ascending and positive, on the same held-out text. The first crossing counts, so noise that raises a loss for
    a while is ignored. Nothing is extrapolated: a loss below the curve is censored (``> `` its last tokens), as is one
    above it (``< `` its first).

    >>> print(tokens_of_plain(3.5, tokens=[1e6, 2e6, 4e6], losses=[5.0, 4.0, 3.0]))
    2.828e+06
    """
    return crossing(tokens, losses, target=loss, log=True)


@formerly_positional("tokens", "losses")
def compute_penalty(loss: float, trained: float, *, tokens: Sequence[float], losses: Sequence[float]) -> Crossing:
    r"""Return the share of its training that a model has lost, measured by retain loss.

    .. math:: \text{penalty} = 1 - \frac{T_\text{plain}(L)}{T}

    with T the tokens that the model was trained on, L its retain loss, and :math:`T_\text{plain}(L)` the tokens after which
    the plain model has that loss. SGTM (arXiv 2512.05648) reports 5 % on general text at 254M parameters. The same number
    for forget text should be near 1.

    In code, L is ``loss`` and T is ``trained``; ``tokens`` and ``losses`` are those of `tokens_of_plain`. 0 is no cost, below 0
    a gain. Where the plain model's curve does not cover the loss, the penalty is only known to be less (``<``) or more (``>``).

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

    with u the unlabeled forget tokens that the model was trained on, L its forget loss with the region ablated, and n(L) the
    forget tokens, among the same retain text, from which plain training has that loss. Of one unlabeled token 1 is what
    filtering leaks, by definition; SGTM finds 0.005 to 0.02 at 64M parameters (arXiv 2512.05648, section on leakage).

    In code, L is ``loss`` and u is ``unlabeled``; ``tokens`` and ``losses`` are of several plain runs, tokens ascending.
    Censored where these do not cover the loss (``<`` where even the fewest tokens taught more).

    >>> print(leakage(4.0, unlabeled=1e6, tokens=[1e3, 1e5], losses=[5.0, 3.0]))
    0.01
    >>> leakage(6.0, unlabeled=1e6, tokens=[1e3, 1e5], losses=[5.0, 3.0])
    Crossing(at=0.001, relation='<')
    """
    if unlabeled <= 0:
        got = f"`unlabeled` must be a positive number of tokens, got {unlabeled}"
        raise ValueError(f"{got}: without any, nothing can leak")
    needed = tokens_of_plain(loss, tokens, losses)
    return Crossing(needed.at / unlabeled, needed.relation)


def absorption(loss: float, filtered: float, perfect: float) -> float:
    r"""Return the share of the unlabeled forget data that the ablated model lacks, as it lacks the labeled.

    .. math:: \text{absorption} = \frac{L - L_\text{filter}}{L_\text{perfect} - L_\text{filter}}

    with L the loss on held-out forget text, in nats per token. It is 0 for the filter with the same labels, which trains on
    all that is unlabeled, and 1 where unlabeled forget data is missing as if it had been filtered. The
    phenomenon is that of gradient routing (arXiv 2410.04332, section 4.2); the formula is this library's. NaN where there is
    nothing to absorb.

    >>> absorption(5.25, filtered=4.5, perfect=6.0)
    0.5
    """
    return removed(loss, filtered, perfect)
