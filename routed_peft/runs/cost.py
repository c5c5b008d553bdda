"""What a method costs: floating-point operations, steps one after another, tokens, and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Ledger:
    r"""The cost of a training run; ledgers of stages add up.

    .. math:: \text{FLOPs} = 6\,N\,D + 2\,N_T\,D_T

    for N parameters in matrix products and D tokens forward and backward, and a frozen teacher or reference of
    :math:`N_T` that saw :math:`D_T` tokens forward (Kaplan et al., arXiv 2001.08361, section 2.1, without the attention
    scores). Distilling a model into one of its own size thus costs 8 N D, or 6 N D once the teacher's outputs are stored.

    Attributes:
        flops: floating-point operations. Where only a part of the model is trained, an upper bound.
        serial_steps: optimizer steps, which no number of machines can do at once.
        tokens: trained on, with repetitions.
        labeled_forget_tokens: different tokens that somebody had to label forget.

    Example:
        >>> step = Ledger.of_training(parameters=100, tokens=10, steps=1, labeled_forget_tokens=5)
        >>> step + Ledger.of_training(parameters=100, tokens=10, steps=1, teacher_tokens=10)
        Ledger(flops=14000, serial_steps=2, tokens=20, labeled_forget_tokens=5)
    """

    flops: int = 0
    serial_steps: int = 0
    tokens: int = 0
    labeled_forget_tokens: int = 0

    @classmethod
    def of_training(
        cls,
        parameters: int,
        tokens: int,
        steps: int,
        labeled_forget_tokens: int = 0,
        teacher_tokens: int = 0,
        teacher_parameters: int | None = None,
    ) -> Ledger:
        """Return the ledger of one run.

        Args:
            parameters: N, see `matmul_parameters`.
            tokens: D.
            steps: optimizer steps.
            labeled_forget_tokens: different ones.
            teacher_tokens: tokens that a frozen model saw.
            teacher_parameters: of that model; those of the trained one by default.
        """
        teacher = parameters if teacher_parameters is None else teacher_parameters
        return cls(6 * parameters * tokens + 2 * teacher * teacher_tokens, steps, tokens, labeled_forget_tokens)

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def to_dict(self) -> dict[str, int]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        """Read what `to_dict` returned.

        Raises:
            ValueError: where entries are missing or unknown.

        Example:
            >>> Ledger.from_dict(Ledger(flops=6).to_dict()).flops
            6
        """
        expected = {field.name for field in fields(cls)}
        if set(data) != expected:
            raise ValueError(f"a ledger has the entries {sorted(expected)}, got {sorted(data)}")
        return cls(**data)


def matmul_parameters(model: nn.Module) -> int:
    """Return how many parameters take part in a matrix product (or a norm) per token: all but tables that are looked up.

    An embedding that is also the output head counts once.

    >>> matmul_parameters(nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 3, bias=False)))
    6
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = getattr(head, "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not tied}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)
