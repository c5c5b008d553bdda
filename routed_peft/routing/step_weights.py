"""The current step's weights: labels turned into weights per group, and the holder from which routed layers read them.

The holder is set before the forward pass and cleared after the backward pass. It is a plain Python object, shared by all
routed layers, because the alternatives fail. A ContextVar is invisible to autograd's device threads and cannot be traced, a
buffer is broadcast from rank 0 by DDP, and a forward argument is gone when gradient checkpointing recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from routed_peft.functional import PositionWeights, RowCache
from routed_peft.routes import BASE, IGNORED, Routes

NO_LABELS = (
    "a GradientRouting is attached to this model, and a forward pass with gradients on has no labels: it would train "
    "without routing. Wrap forward and backward in `with routing(labels):`. For ordinary training write "
    "`with routing.off():`, for inference `with torch.no_grad():`, and after training `routing.detach()`."
)


@dataclass(slots=True)
class GroupWeights:
    """One step's weights for one group (the base or a region)."""

    weights: PositionWeights | None = None  # None where all are one: the layer then runs as if it were not routed
    gate: Tensor | None = None  # 1 where the region takes part in the forward pass, 0 where ablated; None: always 1
    cache: RowCache = field(default_factory=RowCache, repr=False, compare=False)  # shared by neighboring layers


@dataclass(slots=True)
class RoutingState:
    """The holder that routed layers share."""

    groups: dict[str, GroupWeights] | None = None  # the step's weights by group; None between steps
    off: int = 0  # number of open `GradientRouting.off` contexts

    @contextmanager
    def holding(self, groups: dict[str, GroupWeights]) -> Iterator[None]:
        """Hold the step's weights within the block."""
        self.groups = groups
        try:
            yield
        finally:
            self.groups = None

    def read(self, group: str) -> GroupWeights | None:
        """Return a group's weights, or None where layers run unrouted; ValueError for training without labels."""
        if self.groups is not None:
            return self.groups[group]
        if torch.is_grad_enabled() and not self.off:
            raise ValueError(NO_LABELS)
        return None


def label_indices(labels: Sequence[str] | Sequence[int] | Tensor, routes: Routes) -> Tensor:
    """Resolve labels to indices into ``list(routes)``: a LongTensor on the CPU, ``(B,)`` or ``(B, T)``.

    ``labels`` are names, one per example, or integers ``(B,)`` or ``(B, T)``; -100 marks padding.

    Raises:
        ValueError: on an unknown label, an index out of range or a wrong number of axes.

    >>> from routed_peft import presets
    >>> label_indices(["retain", "forget"], presets.sgtm())
    tensor([1, 0])
    """
    known = list(routes)
    if not isinstance(labels, Tensor):
        unknown = sorted({str(label) for label in labels if isinstance(label, str) and label not in known})
        if unknown:
            raise ValueError(f"no route for the label {unknown[0]!r}; the routes are {known}")
        labels = torch.tensor([known.index(label) if isinstance(label, str) else label for label in labels])
    labels = labels.detach().cpu()
    if labels.dim() not in (1, 2) or labels.is_floating_point() or not labels.numel():
        raise ValueError(f"`labels` are integers of shape (B,) or (B, T), or one name per example; got {labels.dtype} "
                         f"{tuple(labels.shape)}")  # fmt: skip
    real = labels[labels != IGNORED]
    if real.numel() and (int(real.min()) < 0 or int(real.max()) >= len(known)):
        raise ValueError(f"`labels` index the routes {known}, so 0 … {len(known) - 1} ({IGNORED} for padding); got "
                         f"values from {int(real.min())} to {int(real.max())}")  # fmt: skip
    return labels.long()


@dataclass(slots=True)
class RouteTable:
    """The routes as tensors, which turn the labels of a step into weights per group."""

    routes: Routes
    regions: Sequence[str]
    gather: bool = True  # leave positions of weight zero out of weight-gradient matmuls
    dtype: torch.dtype = torch.float32  # of the weights; float64 only for models in float64
    _tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in (BASE, *self.regions):
            weight = torch.tensor([route.weights.get(group, 1.0) for route in self.routes.values()], dtype=self.dtype)
            present = torch.tensor([group not in route.ablated for route in self.routes.values()])
            self._tables[group] = (weight, present)

    def effective_weights(self, labels: Tensor, multipliers: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return each group's weight times its presence (0 or 1), ``(B,)`` or ``(B, T)`` on the CPU; 0 at padding."""
        unknown = set(multipliers or ()) - set(self._tables)
        if unknown:
            raise ValueError(f"`weights` has {sorted(unknown)}; the groups are {list(self._tables)}")
        result = {}
        for group, (weight, present) in self._tables.items():
            m = (weight * present)[labels.clamp(min=0)] * (labels != IGNORED)
            if multipliers and group in multipliers:
                m = _multiplied(m, multipliers[group].detach().cpu().to(self.dtype), group)
            result[group] = m
        return result

    def prepare(self, labels: Tensor, effective: Mapping[str, Tensor], device: torch.device) -> dict[str, GroupWeights]:
        """Return ``effective`` weights and the regions' gates in the form that layers read, on ``device``."""
        real = labels != IGNORED
        result = {}
        for group, m in effective.items():
            is_real = real if m.dim() == real.dim() else real.unsqueeze(1).expand_as(m)
            # Padding has no gradient of its own, so its weight does not keep a layer from running unrouted.
            plain = bool((m[is_real] == 1).all())
            weights = None if plain else PositionWeights.from_weights(m, self.gather)
            present = self._tables[group][1][labels.clamp(min=0)]
            gate = None if bool(present[real].all()) else (present & real).to(self.dtype).to(device)
            result[group] = GroupWeights(weights and weights.to(device), gate)
        return result


def _multiplied(m: Tensor, multiplier: Tensor, group: str) -> Tensor:
    lengths = {t.shape[1] for t in (m, multiplier) if t.dim() == 2} - {1}
    if multiplier.dim() not in (1, 2) or len(multiplier) != len(m) or len(lengths) > 1:
        raise ValueError(f"`weights[{group!r}]` is one number per example or per position; got "
                         f"{tuple(multiplier.shape)} for labels of shape {tuple(m.shape)}")  # fmt: skip
    if multiplier.dim() > m.dim():
        m = m.unsqueeze(1)
    elif multiplier.dim() < m.dim():
        multiplier = multiplier.unsqueeze(1)
    return m * multiplier
