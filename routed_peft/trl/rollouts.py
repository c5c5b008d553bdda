"""Rollouts, the labels a label function returns for them, and both as tensors of TRL's batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from routed_peft.data.columns import (
    ROUTE_LABEL,
    ROUTE_LABELS,
    ROUTE_QUARANTINE,
    ROUTE_WEIGHTS,
    check_has_route,
    label_name,
)
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
        own = dict(vars(self))
        columns = {name: [row[name] for row in self.rows] for name in (self.rows[0] if self.rows else ())}
        return {**{name: values for name, values in columns.items() if name != "prompt"}, **own}


LabelFunction = Callable[..., Sequence[str] | Sequence[Sequence[str]] | RolloutLabels]
"""Called with the arguments of `Rollouts` and the dataset's columns, by keyword."""


def label_rollouts(label_fn: LabelFunction, rollouts: Rollouts, routes: Mapping[str, Any]) -> RolloutLabels:
    """Call a label function and check its answer; a label in ``route_quarantine`` replaces that of its row."""
    answer = label_fn(**rollouts.arguments())
    answer = answer if isinstance(answer, RolloutLabels) else RolloutLabels(answer)
    weights = {group: _plain(values) for group, values in answer.weights.items()}
    answer = RolloutLabels(_plain(answer.labels), weights, _plain(answer.advantages))
    name = getattr(label_fn, "__name__", type(label_fn).__name__)
    _check_shape(name, "labels", values=answer.labels, rollouts=rollouts)
    forced = [row.get(ROUTE_QUARANTINE) for row in rollouts.rows]
    labels = [
        label if new is None else [new] * len(label) if _is_list(label) else new
        for label, new in zip(answer.labels, forced, strict=True)
    ]
    answer = replace(answer, labels=labels)
    for label in {label for row in answer.labels for label in (row if _is_list(row) else [row])}:
        check_has_route(label_name(label), routes)
    for group, values in answer.weights.items():
        _check_shape(name, f"weights[{group!r}]", values=values, rollouts=rollouts)
        _check_finite(name, f"weights[{group!r}]", values)
    if answer.advantages is not None:
        _check_shape(name, "advantages", values=answer.advantages, rollouts=rollouts)
        _check_finite(name, "advantages", answer.advantages)
    return answer


def _plain(values: Any) -> Any:
    """Return lists in place of tensors and arrays, at either depth."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def _check_finite(name: str, what: str, values: Numbers) -> None:
    for index, value in enumerate(values):
        if not all(isinstance(v, int | float) and isfinite(v) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"the label function {name!r} returned {what} that are not finite numbers for rollout {index}: {value}"
            )


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__len__")


def _check_shape(name: str, what: str, *, values: Any, rollouts: Rollouts) -> None:
    expected = len(rollouts.completion_ids)
    if not _is_list(values) or len(values) != expected:
        got = len(values) if _is_list(values) else repr(values)
        raise ValueError(
            f"the label function {name!r} returned {got} {what} for {expected} rollouts: return one per rollout, in their order"
        )
    per_token = [_is_list(value) for value in values]
    if any(per_token) != all(per_token):
        raise ValueError(f"the label function {name!r} returned {what} per rollout and per token at once: choose one")
    pairs = enumerate(zip(values, rollouts.completion_ids, strict=True)) if any(per_token) else ()
    for index, (value, ids) in pairs:
        if len(value) != len(ids):
            raise ValueError(f"the label function {name!r} returned {len(value)} {what} for the {len(ids)} tokens of "
                             f"rollout {index}: return one per token of the completion (`completion_ids`)")  # fmt: skip


def position_values(values: Numbers, prompt_mask: Tensor, *, completions: int, fill: float) -> Tensor:
    """Place values of completion tokens, one list per rollout, at the positions that predict them: float ``(B, P + C)``.

    Prompt positions before the last take the value of the first token; padding takes ``fill``. ``prompt_mask`` is ``(B, P)``,
    padded on the left, and ``completions`` C, the padded length of the completions.

    >>> position_values([[5, 6]], torch.tensor([[0, 1, 1]]), completions=3, fill=-100).tolist()
    [[-100.0, 5.0, 5.0, 6.0, -100.0, -100.0]]
    """
    batch, prompts = prompt_mask.shape
    grid = torch.full((batch, prompts + completions), float(fill))
    for row, tokens, mask in zip(grid, values, prompt_mask.cpu().bool(), strict=True):
        if len(tokens):  # type: ignore[arg-type]
            row[:prompts][mask] = float(tokens[0])  # type: ignore[index]
            row[prompts - 1 : prompts - 1 + len(tokens)] = torch.as_tensor(tokens, dtype=torch.float32)  # type: ignore[arg-type]
    return grid


def label_tensors(answer: RolloutLabels, routes: Mapping[str, Any], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the keys for TRL's batch: labels as indices of routes, ``(B,)`` or ``(B, P + C)``, and weights.

    TRL shuffles and splits every key of a batch along its first axis, so these follow their completions.
    """
    index = {label: i for i, label in enumerate(routes)}
    mask, length = batch["prompt_mask"], batch["completion_ids"].shape[1]
    out: dict[str, Tensor] = {}
    if _is_list(answer.labels[0]):
        rows = [[index[str(label)] for label in row] for row in answer.labels]
        out[ROUTE_LABELS] = position_values(rows, mask, completions=length, fill=IGNORED).long()
    else:
        out[ROUTE_LABEL] = torch.tensor([index[str(label)] for label in answer.labels])
    for group, values in answer.weights.items():
        out[f"{ROUTE_WEIGHTS}.{group}"] = (
            position_values(values, mask, completions=length, fill=1.0)
            if _is_list(values[0])
            else torch.tensor(values, dtype=torch.float32)
        )
    return out


def nest_weights(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with its flat weight keys as one mapping, as trainers take it."""
    flat = [name for name in batch if name.startswith(f"{ROUTE_WEIGHTS}.")]
    if not flat:
        return dict(batch)
    weights = {name.removeprefix(f"{ROUTE_WEIGHTS}."): batch[name] for name in flat}
    return {**{name: value for name, value in batch.items() if name not in flat}, ROUTE_WEIGHTS: weights}


def advantage_tensor(advantages: Numbers, completions: int, device: torch.device) -> Tensor:
    """Return advantages as ``(B,)``, or by token as ``(B, C)`` padded with 0."""
    if not _is_list(advantages[0]):
        return torch.tensor(advantages, dtype=torch.float32, device=device)
    grid = torch.zeros(len(advantages), completions, device=device)
    for row, values in zip(grid, advantages, strict=True):
        row[: len(values)] = torch.as_tensor(values, dtype=torch.float32)  # type: ignore[arg-type]
    return grid
