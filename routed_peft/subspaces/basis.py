r"""`Subspace`: an orthonormal basis of a few directions in the residual stream, with its provenance.

Conventions: a basis ``U`` is ``(d, k)`` with :math:`U^\top U = I` and ``1 <= k < d``. Decoder layers count from 0, and the
residual stream of layer ℓ is the one *behind* it (``resid_post``, ``hidden_states[ℓ + 1]`` in transformers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from routed_peft.deprecation import warn_renamed
from routed_peft.files import atomic_write

_METADATA = "routed_peft_subspace"
_DERIVED = ("width", "k", "layers", "layer_convention", "sha256")
_SHARED = "U"
_TOLERANCE = 1e-4


def check_basis(u: Tensor, what: str = "`U`") -> None:
    """Raise ValueError unless ``u`` is an orthonormal basis ``(d, k)`` with ``1 <= k < d``."""
    if u.dim() != 2 or not u.is_floating_point():
        raise ValueError(f"{what} must be a floating-point matrix (d, k), got {u.dtype} of shape {tuple(u.shape)}")
    d, k = u.shape
    if not 1 <= k < d:
        raise ValueError(f"{what} has {k} directions in a residual stream of width {d}: there must be at least one, "
                         f"and fewer than {d} (preferably a handful: the model itself cannot learn along them)")  # fmt: skip
    wide = u.cpu().double()  # on the CPU, because not every GPU has float64
    error = float((wide.T @ wide - torch.eye(k, dtype=torch.float64)).abs().max())
    if not error <= _TOLERANCE:
        raise ValueError(f"{what} is not orthonormal: its columns' inner products differ from the identity by {error:.3g}, "
            f"allowed is {_TOLERANCE}. Orthonormalize it (`Subspace.from_directions`), and keep it in float32")  # fmt: skip


def each_basis(
    bases: Tensor | Mapping[int, Tensor], change: Callable[[Tensor, int | None], Tensor]
) -> Tensor | dict[int, Tensor]:
    """Return what ``change`` makes of a tensor, or of each layer's in order; it is called with the tensor and its layer."""
    if isinstance(bases, Tensor):
        return change(bases, None)
    return {int(layer): change(bases[layer], int(layer)) for layer in sorted(bases, key=int)}


@dataclass(frozen=True)
class Subspace:
    """A basis for all layers, or one for each of several layers.

    Attributes:
        bases: ``(d, k)`` in float32, or one such basis per decoder layer, all of one shape.
        provenance: origin, as plain data: source, model, revision, hook point, texts, seed, …

    Raises:
        ValueError: where a basis is not orthonormal, has too many directions, or bases differ in shape.

    >>> subspace = Subspace.from_directions(torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]), source="by hand")
    >>> subspace.width, subspace.k, subspace.layers
    (4, 2, None)
    """

    bases: Tensor | Mapping[int, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bases = each_basis(self.bases, lambda u, _: u.detach().to("cpu", torch.float32).contiguous())
        object.__setattr__(self, "bases", bases)
        if not (named := self._named()):
            raise ValueError("`bases` is empty: give a basis (d, k), or one per decoder layer")
        for name, u in named.items():
            check_basis(u, f"`{name}`")
        if len(shapes := sorted({tuple(u.shape) for u in named.values()})) > 1:
            raise ValueError(f"the bases of all layers must have one shape (d, k), got {shapes}")

    @classmethod
    def from_directions(cls, directions: Tensor | Mapping[int, Tensor], **provenance: Any) -> Subspace:
        """Return the span of ``directions``, ``(n, d)`` or such by layer, strongest first; they may depend on each other.

        >>> Subspace.from_directions(torch.tensor([[2.0, 0.0], [4.0, 0.0]])).at(0).abs()
        tensor([[1.],
                [0.]])
        """

        def span(directions: Tensor, _: int | None) -> Tensor:
            u, s, _ = torch.linalg.svd(directions.cpu().double().T, full_matrices=False)
            return u[:, s > 1e-6 * s.max()]

        return cls(each_basis(directions, span), provenance)

    @classmethod
    def of(cls, directions: Tensor | Mapping[int, Tensor], **provenance: Any) -> Subspace:
        """Return `from_directions` of the same arguments: the old name, deprecated."""
        warn_renamed("Subspace.of", "Subspace.from_directions")
        return cls.from_directions(directions, **provenance)

    @property
    def width(self) -> int:
        """The width d of the residual stream."""
        return next(iter(self._named().values())).shape[0]

    @property
    def k(self) -> int:
        """The number of directions."""
        return next(iter(self._named().values())).shape[1]

    @property
    def layers(self) -> list[int] | None:
        """The decoder layers with bases of their own; None where one basis serves all."""
        return None if isinstance(self.bases, Tensor) else list(self.bases)

    def at(self, layer: int) -> Tensor:
        """Return the basis for a decoder layer; ValueError where there is none."""
        if isinstance(self.bases, Tensor):
            return self.bases
        if layer in self.bases:
            return self.bases[layer]
        raise ValueError(f"this subspace has no basis for layer {layer}, only for {self.layers}: measure it there, or choose "
                         "`layers_to_transform`")  # fmt: skip

    @property
    def sha256(self) -> str:
        """Hash of the names and values of the bases."""
        digest = hashlib.sha256()
        for name, u in self._named().items():
            digest.update(f"{name}:{tuple(u.shape)};".encode() + u.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the provenance, shape and hash as plain data for JSON."""
        derived = (self.width, self.k, self.layers, "resid_post of decoder layer, from 0", self.sha256)
        return {**self.provenance, **dict(zip(_DERIVED, derived, strict=True))}

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: ``U``, or ``U.0``, ``U.1``, …, with the provenance as JSON in its metadata."""
        path = Path(path).expanduser()
        with atomic_write(path) as aside:
            save_file(self._named(), aside, metadata={"format": "pt", _METADATA: json.dumps(self.describe())})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Read the file of `save`; ValueError where it is damaged, is no subspace, or its values are not the saved ones."""
        if not Path(path).is_file():
            raise ValueError(f"there is no subspace file {str(path)!r}: write one with `Subspace.save`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(_METADATA)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is truncated or not a safetensors file ({error}): get it again") from error
        if metadata is None:
            raise ValueError(f"{str(path)!r} is not a subspace file: it holds {sorted(tensors)[:3]} and no provenance. "
                             "Make one with `routed_peft.subspaces` and `Subspace.save`")  # fmt: skip
        described = json.loads(metadata)
        provenance = {name: value for name, value in described.items() if name not in _DERIVED}
        shared = tensors.get(_SHARED)
        bases = {int(name.removeprefix("U.")): u for name, u in tensors.items()} if shared is None else shared
        subspace = cls(bases, provenance)
        if subspace.sha256 != described["sha256"]:
            raise ValueError(f"the values in {str(path)!r} differ from the saved ones: get the file again")
        return subspace

    def _named(self) -> dict[str, Tensor]:
        return {_SHARED: self.bases} if isinstance(self.bases, Tensor) else {f"U.{i}": u for i, u in self.bases.items()}


@torch.no_grad()
def leak(weight: Tensor, initial: Tensor, u: Tensor) -> float:
    r"""Return the share of a writer's weight change that lies along the subspace.

    .. math:: \mathrm{leak}(W) = \frac{\lVert U^\top (W - W_0) \rVert^2}{\lVert W - W_0 \rVert^2}

    A change in random directions has k / d. After `routed_peft.regions.project_base` only rounding is left, about 1e-14 in
    float32. More than 1e-6 in float32, or 1e-3 in bfloat16, is an alarm. Weights are ``(d, n)``, so transpose those of a Conv1D
    or an embedding, and ``u`` is ``(d, k)``; 0 where nothing changed.

    >>> leak(torch.tensor([[3.0], [4.0]]), torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]))
    0.36
    """
    check_basis(u)
    change = weight.cpu().double() - initial.cpu().double()  # on the CPU, because not every GPU has float64
    total = float(change.square().sum())
    return float((u.to(change).T @ change).square().sum()) / total if total else 0.0


@torch.no_grad()
def drift(hidden: Tensor, reference: Tensor, u: Tensor) -> float:
    r"""Return the relative change of hidden states along the subspace.

    .. math:: d_U = \frac{\lVert U^\top (h - h_0) \rVert}{\lVert U^\top h_0 \rVert}

    The cut removes the gradient along the subspace, which is a first-order protection. This measures the movement that
    remains, on fixed texts, with the region ablated. Hidden states are residual streams ``(..., d)``; the reference is that of
    the untrained model; ``u`` is ``(d, k)``.

    >>> drift(torch.tensor([3.0, 9.0]), torch.tensor([2.0, 0.0]), torch.tensor([[1.0], [0.0]]))
    0.5
    """
    check_basis(u)
    basis = u.cpu().double()
    before = reference.cpu().double() @ basis
    return float((hidden.cpu().double() @ basis - before).norm() / before.norm())
