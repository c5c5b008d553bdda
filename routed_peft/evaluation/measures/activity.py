"""Activity of a region on forget and on retain text, layer by layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from routed_peft.adapters import adapters_in, outlet_modules, tuner_layers
from routed_peft.deprecation import formerly_positional
from routed_peft.evaluation.text_loss import TextLoss
from routed_peft.routes import IGNORED


@dataclass(frozen=True)
class Activity:
    """Mean absolute activation of a region's units in one layer, over the tokens of forget and of retain text."""

    forget: float
    retain: float

    @property
    def ratio(self) -> float:
        """Forget over retain: 1 if the region does not distinguish them; NaN if it is silent on retain text.

        >>> Activity(forget=3.0, retain=1.5).ratio
        2.0
        """
        return self.forget / self.retain if self.retain else math.nan


@formerly_positional("region", "forget", "retain")
def region_activity(
    model: nn.Module, tokenizer: Any, *, region: str, forget: Sequence[str], retain: Sequence[str]
) -> dict[str, Activity]:
    r"""Return the activity of a region on forget and on retain text, by name of the layer.

    .. math:: a_\text{side} = \frac{1}{|T|\,n} \sum_{t \in T} \sum_{j=1}^{n} |h_{t,j}|

    over the tokens T of that side, with h the region's n hidden activations: the inputs of its last projection. These have no
    unit; compare them within a layer. A ratio above 1 means that the region has specialized, the mechanism behind absorption
    (gradient routing, arXiv 2410.04332, section 4.2). ``model`` is a PEFT model in which the ``region``, an adapter, is on.

    Raises:
        ValueError: if no layer has such a region, or the region is merged or not active.
    """
    outlets = {  # layer -> the projection through which the region's whole contribution passes
        name: module
        for name, layer in tuner_layers(model)
        if region in adapters_in(layer)
        for module in outlet_modules(layer, region)
    }
    if not outlets:
        problem = f"no layer of this {type(model).__name__} has a region {region!r}"
        raise ValueError(f"{problem}: give a model that was loaded with it")
    losses = (TextLoss(model, tokenizer, texts) for texts in (forget, retain))
    forget_means, retain_means = (_means(model, outlets, loss) for loss in losses)
    if silent := [name for name in outlets if name not in forget_means]:
        raise ValueError(f"the region {region!r} takes no part in {silent[0]!r}: activate it, and do not merge it")
    return {name: Activity(forget_means[name], retain_means[name]) for name in outlets}


def _means(model: nn.Module, outlets: dict[str, nn.Module], loss: TextLoss) -> dict[str, float]:
    """Return the mean absolute input of each outlet that takes part, over the scored tokens."""
    inputs: dict[str, Tensor] = {}  # the latest one of each
    sums, tokens = dict.fromkeys(outlets, 0.0), 0
    with contextlib.ExitStack() as stack:
        for name, module in outlets.items():

            def keep(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                inputs[name] = arguments[0].detach()

            stack.callback(module.register_forward_pre_hook(keep).remove)
        for _, targets, _ in loss.batches(model):
            scored = targets != IGNORED
            tokens += int(scored.sum())
            for name, hidden in inputs.items():
                sums[name] += float(hidden[scored].abs().cpu().double().mean(-1).sum())
    return {name: sums[name] / tokens for name in outlets if name in inputs}
