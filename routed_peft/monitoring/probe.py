"""Effect of a region on the model, measured on a few rows of a step with and without the region."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routed_peft.ablation import ablated
from routed_peft.eval_mode import evaluating
from routed_peft.monitoring.factors import Factors

Reward = Callable[[nn.Module, str], float]
"""``reward(model, environment)``: the mean reward of some rollouts."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch."""

    inputs: dict[str, Tensor]  # of the model
    predicts: Tensor  # bool (B, T), the positions from which a token with a loss is predicted
    environment: Tensor  # (B,), number of each row's environment


@dataclass
class Effect:
    r"""Effect of a region of L layers, by environment (E); NaN for environments without rows in the probe.

    Attributes:
        kl: :math:`\mathrm{KL}(p_\text{full} \,\|\, p_\text{ablated})` in nats per predicted token, ``(E,)``.
        functional_size: RMS of the region's output over RMS of its layers' output, ``(L, E)``.
        overall: the same over all layers, ``(E,)``.
    """

    kl: Tensor
    functional_size: Tensor
    overall: Tensor


@dataclass
class Probe:
    """Rows of one step, for extra forward passes without gradients."""

    per_batch: int  # rows to keep of each batch
    batches: int = 1  # to keep rows of
    turn: int = 0  # shifts the first environment, so that all have their turn over the steps
    kept: list[Rows] = field(default_factory=list)

    def keep(
        self, inputs: Mapping[str, Any], predicts: Tensor, *, rows: Mapping[str, Tensor], environments: Sequence[str]
    ) -> None:
        """Keep some rows of a batch, of as many environments as possible.

        ``inputs`` hold ``input_ids`` and ``attention_mask``, or prompts and completions as in TRL's GRPO; ``predicts`` is
        bool ``(B, T)``, see `Rows`; ``rows`` are the indices of each environment's rows, out of all ``environments``.
        """
        if len(self.kept) == self.batches:
            return
        first = (self.turn + len(self.kept)) * self.per_batch % len(rows)
        names = [*list(rows)[first:], *list(rows)[:first]]
        by_turn = sorted((turn, names.index(name), int(row)) for name in rows for turn, row in enumerate(rows[name]))
        chosen = by_turn[: self.per_batch]
        index = torch.tensor([row for *_, row in chosen])
        tokens = {name: value[index.to(value.device)] for name, value in model_inputs(inputs).items()}
        environment = torch.tensor([environments.index(names[number]) for _, number, _ in chosen])
        self.kept.append(Rows(tokens, predicts.cpu()[index], environment))

    @torch.no_grad()
    def measure(
        self, model: nn.Module, factors: Mapping[str, Sequence[Factors]], *, environments: int, reduce: Any
    ) -> dict[str, Effect]:
        """Return the effect of every region, in evaluation mode and over the rows of all processes, which ``reduce`` sums."""
        sums = {region: _Sums(layers, environments) for region, layers in factors.items()}
        kept, self.kept = self.kept, []
        with evaluating(model):
            for rows in kept:
                _add(model, rows, sums)
        return {region: s.effect(reduce) for region, s in sums.items()}


class _Sums:
    """Sums over rows so far: squares of a region's and its layers' outputs, KL and predictions."""

    def __init__(self, layers: Sequence[Factors], environments: int) -> None:
        self.layers = layers
        device = layers[0].a.weight.device
        self.squares = torch.zeros(2, len(layers), environments, device=device)
        self.kl = torch.zeros(2, environments, device=device)

    def watch(self, rows: Rows, stack: ExitStack) -> None:
        """Add up squares of outputs in forward passes, until the end of ``stack``."""
        real = rows.inputs.get("attention_mask", torch.ones_like(rows.inputs["input_ids"])) != 0

        def hook(total: Tensor, scale: float, _: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            squares = (scale * output.float()).square().sum(-1) * real.to(output.device)
            total.index_add_(0, rows.environment.to(squares.device), squares.sum(1))

        for f, region, layer in zip(self.layers, *self.squares, strict=True):
            stack.callback(f.modules[-1].register_forward_hook(partial(hook, region, f.scale)).remove)
            stack.callback(f.layer.register_forward_hook(partial(hook, layer, 1.0)).remove)

    def effect(self, reduce: Any) -> Effect:
        both = reduce(torch.cat([self.squares.flatten(), self.kl.flatten()])).cpu()
        region, layer = both[: self.squares.numel()].view(self.squares.shape)
        kl, count = both[self.squares.numel() :].view(self.kl.shape)
        return Effect(kl / count, (region / layer).sqrt(), (region.sum(0) / layer.sum(0)).sqrt())


def _add(model: nn.Module, rows: Rows, sums: Mapping[str, _Sums]) -> None:
    with ExitStack() as stack:
        for s in sums.values():
            s.watch(rows, stack)
        full = _log_probabilities(model, rows)
    environment, predicts = rows.environment.to(full.device), rows.predicts.to(full.device)
    for region, s in sums.items():
        with ablated(model, region):
            without = _log_probabilities(model, rows)
        divergence = F.kl_div(without, full, log_target=True, reduction="none").sum(-1)
        by_row = torch.zeros_like(predicts, dtype=divergence.dtype).masked_scatter_(predicts, divergence).sum(1)
        s.kl[0].index_add_(0, environment, by_row)
        s.kl[1].index_add_(0, environment, predicts.sum(1).to(s.kl))


def _log_probabilities(model: nn.Module, rows: Rows) -> Tensor:
    """Return log-probabilities ``(N, V)`` at the positions that predict a token."""
    device = next(model.parameters()).device
    logits = model(**{name: value.to(device) for name, value in rows.inputs.items()}).logits
    return logits[rows.predicts.to(logits.device)].float().log_softmax(-1)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the model's inputs from a batch; prompts and completions (TRL's GRPO) are joined.

    >>> one = torch.ones(1, 1, dtype=torch.long)
    >>> model_inputs({"prompt_ids": one, "prompt_mask": one, "completion_ids": 2 * one, "completion_mask": one})
    {'input_ids': tensor([[1, 2]]), 'attention_mask': tensor([[1, 1]])}
    """
    if "prompt_ids" in batch:
        parts = {"input_ids": "ids", "attention_mask": "mask"}
        return {name: torch.cat([batch[f"prompt_{p}"], batch[f"completion_{p}"]], 1) for name, p in parts.items()}
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


@torch.no_grad()
def reward_gaps(
    reward: Reward, model: nn.Module, *, regions: Iterable[str], environments: Sequence[str], reduce: Any, seed: int
) -> dict[str, dict[str, float]]:
    """Return region -> environment -> reward with the region on minus reward with it ablated.

    Both are measured in evaluation mode and under the same random numbers. The run's own generators are not changed.
    ``reduce`` takes the mean of a tensor over processes.
    """

    def rewards() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.tensor([float(reward(model, name)) for name in environments])

    gaps = {}
    with evaluating(model):
        full = rewards()
        for region in regions:
            with ablated(model, region):
                gaps[region] = dict(zip(environments, reduce(full - rewards()).tolist(), strict=True))
    return gaps
