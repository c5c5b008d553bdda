"""Compute and label cost of a run: floating-point operations, serial steps, tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class TrainingCost:
    r"""The cost of a training run; costs of its stages add up.

    .. math:: \text{FLOPs} = 6\,N\,D + 2\,N_T\,D_T

    for N parameters in matrix products and D tokens forward and backward, and a frozen teacher or reference of
    :math:`N_T` that saw :math:`D_T` tokens forward (Kaplan et al., arXiv 2001.08361, section 2.1, without the attention
    scores). Distilling a model into one of its own size thus costs 8 N D, or 6 N D once the teacher's outputs are stored.

    >>> step = TrainingCost.from_counts(parameters=100, tokens=10, steps=1, labeled_forget_tokens=5)
    >>> step + TrainingCost.from_counts(parameters=100, tokens=10, steps=1, teacher_tokens=10)
    TrainingCost(flops=14000, serial_steps=2, tokens=20, labeled_forget_tokens=5)
    """

    flops: int = 0  # floating-point operations; an upper bound if only a part of the model is trained
    serial_steps: int = 0  # optimizer steps, which cannot be run in parallel
    tokens: int = 0  # tokens trained on, repetitions included
    labeled_forget_tokens: int = 0  # distinct tokens that somebody had to label forget

    @classmethod
    def from_counts(
        cls,
        parameters: int,
        tokens: int,
        *,
        steps: int,
        labeled_forget_tokens: int = 0,
        teacher_tokens: int = 0,
        teacher_parameters: int | None = None,
    ) -> TrainingCost:
        """Return the cost of one run: N ``parameters`` (`matmul_parameters`), D ``tokens``, and those of the teacher."""
        teacher = parameters if teacher_parameters is None else teacher_parameters
        return cls(6 * parameters * tokens + 2 * teacher * teacher_tokens, steps, tokens, labeled_forget_tokens)

    def __add__(self, other: TrainingCost) -> TrainingCost:
        return TrainingCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def to_dict(self) -> dict[str, int]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingCost:
        """Read what `to_dict` returned; raise ValueError where entries are missing or unknown."""
        expected = {field.name for field in fields(cls)}
        if set(data) != expected:
            raise ValueError(f"a cost has the entries {sorted(expected)}, got {sorted(data)}")
        return cls(**data)


def matmul_parameters(model: nn.Module) -> int:
    """Return the number of parameters in matrix products and norms per token: all except embedding tables.

    A table that is also the output head counts once.

    >>> matmul_parameters(nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 3, bias=False)))
    6
    """
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - heads
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)
