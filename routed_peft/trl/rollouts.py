"""Rollouts, the labels a label function returns for them, and both as tensors of TRL's batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from routed_peft.data import columns
from routed_peft.routes import IGNORED

ANCHOR = "anchor"
"""The label of unflagged rollouts that were sampled with all regions ablated."""

Numbers = Sequence[float] | Sequence[Sequence[float]]


@dataclass
class RolloutLabels:
    """Labels of rollouts with weights or advantages, for label functions that return more than labels.

    Every field has one entry per rollout: a single value, or a list with one value per token of the completion.

    Attributes:
        labels: names of routes.
        weights: group -> multipliers of the route's weight; see ``route_weights``.
        advantages: replace those of TRL.

    >>> RolloutLabels(["flagged", "unflagged"], weights={"base": [1.0, 0.5]}).weights["base"]
    [1.0, 0.5]
    """

    labels: Sequence[str] | Sequence[Sequence[str]]
    weights: Mapping[str, Numbers] = field(default_factory=dict)
    advantages: Numbers | None = None

    def flagged(self, names: Collection[str]) -> list[bool]:
        """Return whether the label of each rollout, or that of any of its tokens, is among ``names``."""
        return [not set(names).isdisjoint(_listed(row)) for row in self.labels]

    def first_labels(self) -> list[str]:
        """Return the label of each rollout, or of its first token, and `ANCHOR` where it has none."""
        return [next(iter(_listed(row)), ANCHOR) for row in self.labels]

    def tensors(self, routes: Mapping[str, Any], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the keys for TRL's batch: first labels as indices of routes, ``(B,)`` or ``(B, P + C)``, weights, advantages.

        TRL shuffles and splits every key of a batch along its first axis, so these follow their completions.
        """
        index = {label: i for i, label in enumerate(routes)}
        mask, length = batch["prompt_mask"], batch["completion_ids"].shape[1]
        per_token = _is_list(self.labels[0])
        rows = [[index[str(label)] for label in row] if per_token else index[str(row)] for row in self.labels]
        labels = position_values(cast(Any, rows), mask, completions=length, fill=IGNORED).long()
        out = {columns.ROUTE_LABELS if per_token else columns.ROUTE_LABEL: labels}
        for group, values in self.weights.items():
            out[f"{columns.ROUTE_WEIGHTS}.{group}"] = position_values(values, mask, completions=length, fill=1.0)
        if self.advantages is not None:  # of tokens: (B, C), without the positions of prompts
            placed = position_values(self.advantages, torch.zeros(len(rows), 1), completions=length, fill=0.0)
            out["advantages"] = (placed[:, :length] if placed.dim() > 1 else placed).to(batch["advantages"].device)
        return out


@dataclass
class Rollouts:
    """The rollouts of one generation batch in this process, before TRL shuffles and splits them; B of them.

    Attributes:
        rows: the dataset row of each.
        prompts: prompts in TRL's format for reward functions.
        completions: completions in the same format.
        completion_ids: token ids of each completion.
        rewards: weighted sum of the rewards of each, None where no function gave one.
        rewards_per_func: the single rewards, by name of the reward function.
        advantages: TRL's, of each.
        anchor: whether each was sampled with the regions ablated.
        generation: (optimizer step, micro-batch, process), which identify the rollouts, also after resuming.
    """

    rows: list[dict[str, Any]]
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    rewards: list[float | None]
    rewards_per_func: dict[str, list[float | None]]
    advantages: list[float]
    anchor: list[bool]
    generation: tuple[int, int, int] = (0, 0, 0)

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for a label function: the attributes, and every column as a list, as TRL passes them."""
        names = [name for name in (self.rows[0] if self.rows else ()) if name != "prompt"]
        return {**{name: [row[name] for row in self.rows] for name in names}, **vars(self)}

    def label(self, label_fn: LabelFunction, routes: Mapping[str, Any], flagged: Collection[str]) -> RolloutLabels:
        """Call a label function and check its answer; then label rows in quarantine, and anchors that are not ``flagged``."""
        answer = label_fn(**self.arguments())
        answer = answer if isinstance(answer, RolloutLabels) else RolloutLabels(answer)
        name = getattr(label_fn, "__name__", type(label_fn).__name__)
        checked = partial(_checked, label_fn=name, completion_ids=self.completion_ids)
        forced = [row.get(columns.ROUTE_QUARANTINE) for row in self.rows]
        pairs = zip(checked(answer.labels, "labels"), forced, strict=True)
        labels = [given if label is None else _relabeled(given, label) for given, label in pairs]
        for label in {label for row in labels for label in _listed(row)}:
            columns.check_has_route(columns.label_name(label), routes)
        rows = zip(labels, self.anchor, RolloutLabels(labels).flagged(flagged), strict=True)
        labels = [_relabeled(row, ANCHOR) if anchor and not flag else row for row, anchor, flag in rows]
        weights = {group: checked(values, f"weights[{group!r}]") for group, values in answer.weights.items()}
        advantages = None if answer.advantages is None else checked(answer.advantages, "advantages")
        return RolloutLabels(labels, weights, advantages)


LabelFunction = Callable[..., Sequence[str] | Sequence[Sequence[str]] | RolloutLabels]
"""Called with the arguments of `Rollouts` and the dataset's columns, by keyword."""


def _plain(values: Any) -> Any:
    """Return lists in place of tensors and arrays, at either depth."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__len__")


def _listed(value: Any) -> Any:
    return value if _is_list(value) else [value]


def _relabeled(labels: Any, label: str) -> Any:
    return [label] * len(labels) if _is_list(labels) else label


def _checked(values: Any, what: str, *, label_fn: str, completion_ids: Sequence[Any]) -> Any:
    """Return values as lists; raise ValueError unless there is one per rollout, or per token, and all numbers are finite."""
    values, returned = _plain(values), f"the label function {label_fn!r} returned"
    if not _is_list(values) or len(values) != len(completion_ids):
        found = f"{len(values) if _is_list(values) else repr(values)} {what} for {len(completion_ids)} rollouts"
        raise ValueError(f"{returned} {found}: return one per rollout, in their order")
    per_token = [_is_list(value) for value in values]
    if any(per_token) != all(per_token):
        raise ValueError(f"{returned} {what} per rollout and per token at once: choose one")
    for index, (value, ids) in enumerate(zip(values, completion_ids, strict=True)):
        if any(per_token) and len(value) != len(ids):
            raise ValueError(f"{returned} {len(value)} {what} for the {len(ids)} tokens of rollout {index}: return one per "
                             "token of the completion (`completion_ids`)")  # fmt: skip
        if what != "labels" and not all(isinstance(v, int | float) and isfinite(v) for v in _listed(value)):
            raise ValueError(f"{returned} {what} that are not finite numbers for rollout {index}: {value}")
    return values


def position_values(values: Numbers, prompt_mask: Tensor, *, completions: int, fill: float) -> Tensor:
    """Place values of completion tokens, one list per rollout, at the positions that predict them: float ``(B, P + C)``.

    Prompt positions before the last take the value of the first token; padding takes ``fill``. ``prompt_mask`` is ``(B, P)``,
    padded on the left, and ``completions`` C, the padded length of the completions. Single values per rollout stay ``(B,)``.

    >>> position_values([[5, 6]], torch.tensor([[0, 1, 1]]), completions=3, fill=-100).tolist()
    [[-100.0, 5.0, 5.0, 6.0, -100.0, -100.0]]
    """
    if not _is_list(values[0]):
        return torch.tensor(values, dtype=torch.float32)
    batch, prompts = prompt_mask.shape
    grid = torch.full((batch, prompts + completions), float(fill))
    for row, tokens, mask in zip(grid, cast(Any, values), prompt_mask.cpu().bool(), strict=True):
        if len(tokens):
            row[:prompts][mask] = float(tokens[0])
            row[prompts - 1 : prompts - 1 + len(tokens)] = torch.as_tensor(tokens, dtype=torch.float32)
    return grid


def nest_weights(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with its flat weight keys as one mapping, as trainers take it."""
    flat = [name for name in batch if name.startswith(f"{columns.ROUTE_WEIGHTS}.")]
    weights = {name.removeprefix(f"{columns.ROUTE_WEIGHTS}."): batch[name] for name in flat}
    rest = {name: value for name, value in batch.items() if name not in flat}
    return rest | ({columns.ROUTE_WEIGHTS: weights} if flat else {})


def unflagged_advantages(rewards: Tensor, flagged: Tensor, *, num_generations: int, scale_rewards: str) -> Tensor:
    r"""Return advantages over the mean reward of the *unflagged* rollouts of each group.

    .. math::
        a_i = \frac{r_i - \operatorname{mean}_{j \in G,\, j \text{ unflagged}} r_j}{\operatorname{std}_{j \in G} r_j + 10^{-4}}

    Flagged rewards would otherwise raise the baseline and lower the advantages of honest rollouts. Where a whole group is
    flagged, the mean is over the whole group. The standard deviation always is.

    ``rewards`` ``(N,)`` are in TRL's global order, groups together, NaN where a rollout could not be scored; ``flagged`` is
    bool ``(N,)``; ``scale_rewards`` is TRL's ``"group"``, ``"batch"`` or ``"none"``. The result ``(N,)`` is 0 for rollouts
    without a score, and equal to TRL's where nothing is flagged.

    >>> unflagged_advantages(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([False, False, True]), num_generations=3,
    ...                      scale_rewards="none")
    tensor([-1.,  1.,  8.])
    """
    grouped, flags = rewards.view(-1, num_generations), flagged.view(-1, num_generations)
    honest = grouped.masked_fill(flags, torch.nan)
    none_left = honest.isnan().all(dim=1, keepdim=True)
    mean = torch.where(none_left, grouped, honest).nanmean(dim=1, keepdim=True)
    advantages = grouped - mean
    if scale_rewards == "group":
        advantages = advantages / (nanstd(grouped, dim=1).unsqueeze(1) + 1e-4)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return torch.nan_to_num(advantages.view(-1), nan=0.0)


def rollout_metrics(
    labels: Sequence[str],
    rewards: Tensor,
    *,
    anchor: Tensor,
    tokens: Mapping[str, int],
    flagged: Collection[str],
    environments: Sequence[str | None],
) -> dict[str, float]:
    """Return the metrics of one generation batch.

    ``labels`` are those of each rollout, or of its first token; ``rewards`` ``(N,)`` are NaN where there is none; ``anchor``
    is bool ``(N,)``; ``tokens`` counts the completion tokens of each label; ``environments`` are all None where the dataset
    has no such column. The metrics are ``routing/flag_rate``, ``routing/anchor_share``; by label ``routing/share/…``,
    ``routing/tokens/…`` and ``routing/reward/…``; by environment ``routing/environment/…/flag_rate`` and ``…/reward``.

    >>> found = rollout_metrics(["flagged", "unflagged"], torch.tensor([1.0, 0.5]), anchor=torch.tensor([False, True]),
    ...                         tokens={"flagged": 3, "unflagged": 4}, flagged=["flagged"], environments=["B", "A"])
    >>> found["routing/flag_rate"], found["routing/reward/flagged"], found["routing/environment/B/flag_rate"]
    (0.5, 1.0, 1.0)
    """
    flags, mean = torch.tensor([label in flagged for label in labels]), lambda values: values.float().mean().item()
    metrics = {"routing/flag_rate": mean(flags), "routing/anchor_share": mean(anchor)}
    for label in sorted(set(labels)):
        rows = torch.tensor([other == label for other in labels])
        metrics[f"routing/share/{label}"] = mean(rows)
        metrics[f"routing/reward/{label}"] = rewards[rows].nanmean().item()
    metrics |= {f"routing/tokens/{label}": float(count) for label, count in tokens.items()}
    for environment in sorted({str(e) for e in environments if e is not None}):
        rows = torch.tensor([str(other) == environment for other in environments])
        metrics[f"routing/environment/{environment}/flag_rate"] = mean(flags[rows])
        metrics[f"routing/environment/{environment}/reward"] = rewards[rows].nanmean().item()
    return metrics
