"""Routed versions of leaf modules, put in place by swapping a module's class.

Swapping ``__class__`` preserves parameter names, the state dict, ``isinstance``, FSDP wrapping and PEFT's saving; `unswap`
restores the old class. A swapped module reads the step's weights from the shared `RoutingState`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from routed_peft.functional import routed_linear, routed_module, routed_parameter, scale_gradient, spread
from routed_peft.routing.step_weights import GroupWeights, RoutingState


@dataclass(slots=True)
class Attachment:
    """The link between a swapped module and its routing; a plain object, which ``nn.Module`` does not register."""

    state: RoutingState
    group: str  # "base" or a region
    name: str  # of the module, for messages
    original: type[nn.Module]  # the class before the swap
    outlet: bool = False  # as in `routed_peft.routing.groups.Member`
    view: nn.Module | None = None  # of a module evaluated twice: itself under its original class

    def read(self, x: Tensor | None = None) -> GroupWeights | None:
        """Return the step's weights, as `RoutingState.read`; ValueError where they do not line up with an input ``x``."""
        step = self.state.read(self.group)
        if step is not None and x is not None:
            for m in (step.weights.m if step.weights else None, step.gate):
                if m is not None and x.shape[: m.dim()] != m.shape:
                    raise ValueError(f"labels of shape {tuple(m.shape)} do not line up with the input of {self.name!r}, "
                        f"{tuple(x.shape)}: give one label per example or one per position of this very batch")  # fmt: skip
        return step


class Routed:
    """Mixin of every module whose class was swapped."""

    _attachment: Attachment

    def _gated(self, y: Tensor, step: GroupWeights | None) -> Tensor:
        if self._attachment.outlet and step is not None and step.gate is not None:
            return y * spread(step.gate, y)
        return y


class _RoutedLinearBase(Routed):
    def _weight(self) -> Tensor:
        return self.weight  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        step = self._attachment.read(x)
        if step is None or step.weights is None:
            return self._gated(super().forward(x), step)  # type: ignore[misc]
        bias: Tensor | None = self.bias  # type: ignore[attr-defined]
        y = routed_linear(x, self._weight(), m=step.weights, bias=bias, cache=step.cache)
        return self._gated(y, step)


class RoutedLinear(_RoutedLinearBase, nn.Linear):
    """A linear layer whose parameter gradients are weighed by position."""


class _RoutedConv1DBase(_RoutedLinearBase):
    def _weight(self) -> Tensor:
        return self.weight.t()  # type: ignore[attr-defined]


class RoutedConv1D(_RoutedConv1DBase, Conv1D):
    """GPT-2's transposed linear layer, likewise."""


class _RoutedEmbedding(Routed):
    def forward(self, ids: Tensor) -> Tensor:
        step = self._attachment.read()
        y: Tensor = super().forward(ids)  # type: ignore[misc]
        if step is None or step.weights is None:
            return self._gated(y, step)
        m = step.weights.m
        if y.shape[0] == 1 and len(m) > 1:  # learned positions are looked up once for the whole batch
            y = y.expand(len(m), *y.shape[1:])
        if y.shape[: m.dim()] != m.shape:
            self._attachment.read(ids)  # raises, and names the shapes
        return self._gated(scale_gradient(y, m), step)


class _RoutedModule(Routed):
    def forward(self, x: Tensor) -> Tensor:
        step = self._attachment.read()
        view, name = self._attachment.view, self._attachment.name
        assert view is not None
        weights, gate = (None, None) if step is None else (step.weights, step.gate)
        y: Tensor = super().forward(x) if weights is None else routed_module(view, x, align(weights.m, x, name))  # type: ignore[misc]
        return y if gate is None or not self._attachment.outlet else y * spread(align(gate, x, name), y)


class _RoutedRMSNorm(Routed):
    # RMSNorm classes multiply by `self.weight` elementwise, so this property is enough to route them.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        step = self._attachment.read()
        if step is None or step.weights is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        m = align(step.weights.m, x, self._attachment.name)
        self.__dict__["_m"] = m.reshape(m.shape + (1,) * (x.dim() - m.dim()))
        try:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["_m"]

    @property
    def weight(self) -> Tensor:
        parameter: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        m = self.__dict__.get("_m")
        return parameter if m is None else routed_parameter(parameter, m)


class _RoutedInput(Routed):
    # Activation edges: the input's gradient is scaled, the module's own parameters learn as usual.
    def forward(self, x: Tensor) -> Tensor:
        step = self._attachment.read(x)
        if step is not None and step.weights is not None:
            x = scale_gradient(x, step.weights.m)
        return self._gated(super().forward(x), step)  # type: ignore[misc]


def align(m: Tensor, x: Tensor, name: str) -> Tensor:
    """Shape ``m`` so that it broadcasts against ``x`` from the left, heads-first inputs ``(B, H, T, D)`` included.

    ValueError where the axes do not fit, or where the position axis and the head axis have one length.

    >>> import torch
    >>> align(torch.ones(2, 5), torch.ones(2, 3, 5, 8), "q_norm").shape
    torch.Size([2, 1, 5])
    """
    if m.dim() == 1 and x.shape[:1] == m.shape:
        return m
    if m.dim() == 2 and x.dim() == 4 and x.shape[0] == m.shape[0]:
        fits = [axis for axis in (1, 2) if x.shape[axis] == m.shape[1]]
        if len(fits) == 2:
            raise ValueError(f"{name!r} sees {tuple(x.shape)}: with as many heads as positions, token labels "
                             f"{tuple(m.shape)} could belong to either axis. Pad the batch to another length "
                             "(`pad_to_multiple_of`).")  # fmt: skip
        if fits:
            return m if fits == [1] else m.unsqueeze(1)
    elif x.shape[: m.dim()] == m.shape:
        return m
    raise ValueError(f"labels of shape {tuple(m.shape)} do not line up with the input of {name!r}, {tuple(x.shape)}")


_CLASSES: dict[tuple[type[nn.Module], type[Routed]], type[nn.Module]] = {
    (nn.Linear, _RoutedLinearBase): RoutedLinear,
    (Conv1D, _RoutedConv1DBase): RoutedConv1D,
}
"""Routed classes by the class before the swap and the mixin; others than these two are made at the first need."""


def _swapped_class(cls: type[nn.Module], mixin: type[Routed]) -> type[nn.Module]:
    if (cls, mixin) not in _CLASSES:
        _CLASSES[cls, mixin] = type(
            f"Routed{cls.__name__}", (mixin, cls), {"__module__": __name__, "__doc__": mixin.__doc__}
        )
    return _CLASSES[cls, mixin]


def routed_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that routes the own parameters of ``module``, or None where there is none.

    >>> routed_class(nn.Linear(2, 2)).__name__, routed_class(nn.LayerNorm(2)).__name__
    ('RoutedLinear', 'RoutedLayerNorm')
    >>> routed_class(nn.LSTM(2, 2)) is None
    True
    """
    cls = type(module)
    if isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        return _swapped_class(cls, _RoutedLinearBase)
    if isinstance(module, Conv1D) and cls.forward is Conv1D.forward:
        return _swapped_class(cls, _RoutedConv1DBase)
    if isinstance(module, nn.Embedding):
        return _swapped_class(cls, _RoutedEmbedding)
    axes = [p.dim() for p in module._parameters.values() if p is not None]
    if cls.__name__.endswith("RMSNorm") and cls is not nn.RMSNorm and axes == [1]:
        return _swapped_class(cls, _RoutedRMSNorm)
    if not list(module.children()) and (max(axes) == 1 or isinstance(module, nn.Linear)):
        return _swapped_class(cls, _RoutedModule)
    return None


def routed_input_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that routes the gradient of ``module``'s input (activation edges)."""
    return _swapped_class(type(module), _RoutedInput)


def swap(module: nn.Module, cls: type[nn.Module], attachment: Attachment) -> None:
    """Give ``module`` the class ``cls`` and its ``attachment``; ValueError if it has dropout and is to be evaluated twice."""
    if issubclass(cls, _RoutedModule):
        dropouts = [
            name for name, value in vars(module).items() if "drop" in name and isinstance(value, float) and value
        ]
        if dropouts:
            raise ValueError(f"{attachment.name!r} is evaluated twice to be routed, and its dropout would differ each "
                             f"time: set its `{dropouts[0]}` to 0, freeze it, or name it in `joint`")  # fmt: skip
        attachment.view = _view(module)
    module.__dict__["_attachment"] = attachment
    module.__class__ = cls


def _view(module: nn.Module) -> nn.Module:
    """Return a module that shares the attributes and the dictionary of parameters (FSDP replaces these), but no hooks."""
    view: nn.Module = object.__new__(type(module))  # copy.copy would call the constructor of FSDP's classes
    hooks = {name: OrderedDict[int, Any]() for name in vars(module) if name.endswith("_hooks")}
    vars(view).update({**vars(module), **hooks})
    return view


def unswap(module: nn.Module) -> None:
    """Undo `swap`."""
    attachment: Attachment = module.__dict__.pop("_attachment")
    module.__class__ = attachment.original


def parameter_weights(module: nn.Module) -> list[Tensor]:
    """Return the factors by which this step multiplies a module's parameter gradients, given the gradient at its output.

    Each is ``(B,)`` or ``(B, T)``. The list is empty where all weights are one, and for a module that is not swapped.
    """
    if not isinstance(module, Routed):
        return []
    step = module._attachment.read()
    if step is None:
        return []
    weights = [] if step.weights is None or isinstance(module, _RoutedInput) else [step.weights.m]
    return [*weights, step.gate] if module._attachment.outlet and step.gate is not None else weights
