r"""``kind="subspace"``: the common base of layers with a basis, the protected embeddings, and `project_base`.

A region of this kind adds :math:`U M x` to the writers of the residual stream, and keeps all other parameters from learning
along ``U``: the gradient loses its component along ``U`` at every writer (`cut_gradient`), and the component of a trained
weight is restored after every optimizer step (`project_base`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from routed_peft.regions.config import RoutedConfig
from routed_peft.regions.layer import RoutedLayer
from routed_peft.regions.projections import cut_gradient, joint_basis, restore_component
from routed_peft.subspaces.basis import check_basis


class SubspaceLayer(RoutedLayer):
    """A layer whose regions may have a basis of their own.

    Attributes:
        routed_U: by region, its basis ``(d, k)``.
        routed_C0: by region, the component along the basis of the base's weight (and bias, the last column) when the region
            was made: ``(k, n)``.
        strengths: ``"cut"`` or ``"weights"``, by region, for the regions that keep the base from learning.
    """

    routed_U: BufferDict
    routed_C0: BufferDict

    def _init_subspaces(self) -> None:
        self.routed_U = BufferDict({}, persistent=True)
        self.routed_C0 = BufferDict({}, persistent=True)
        self.strengths: dict[str, str] = {}
        self._checked: dict[str, torch.dtype] = {}  # a cast of the model rounds the bases, so they are checked anew

    def _precision(self) -> torch.dtype:
        dtype = self._get_base_layer_device_and_dtype(self.base_layer)[1]
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _add_basis(self, name: str, config: RoutedConfig, *, basis: Tensor | None, width: int) -> None:
        """Store the basis of a region; None where it is about to be loaded, and NaN until then."""
        assert config.provenance is not None
        if basis is None:
            basis = torch.full((width, config.provenance["k"]), float("nan"))
        u = basis.to(self._precision())
        if u.dtype == torch.float64 and not u.isnan().any():  # a basis in float32 is orthonormal to seven digits only
            q, r = torch.linalg.qr(u)
            u = q * r.diagonal().sign()
        self.routed_U[name] = u
        if config.kind == "subspace":
            self.strengths[name] = str(config.strength)
            if config.store_base_part:
                parts = [u.to(p.device).T @ view(p.detach()).to(u) for p, view in _parameters(self.base_layer)]
                self.routed_C0[name] = torch.cat(parts, 1)
        self._move_adapter_to_device_of_base_layer(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Bases, and the weights trained along them, keep their precision whatever that of the base.
        own, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container: Any = getattr(self, attribute)
            if adapter_name not in container:
                continue
            item = container[adapter_name]
            if isinstance(item, nn.Module) and any(p.is_meta for p in item.parameters()):
                continue
            follows = attribute.startswith("lora_") and dtype is not None and dtype.is_floating_point
            container[adapter_name] = item.to(device=device or own, dtype=dtype if follows else None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget the region ``adapter_name``."""
        super().delete_adapter(adapter_name)
        self.strengths.pop(adapter_name, None)
        self._checked.pop(adapter_name, None)

    def basis(self, name: str) -> Tensor:
        """Return the basis of the region ``name``; it is checked at the first call.

        Raises:
            ValueError: where it was never loaded, or is not orthonormal.
        """
        u: Tensor = self.routed_U[name]
        if self._checked.get(name) != u.dtype and not torch.compiler.is_compiling():
            if u.isnan().any():
                raise ValueError(
                    f"the basis of the region {name!r} was not loaded: a config that was saved with a region is for loading "
                    "its files. For a new region pass `subspace`, the path of a subspace file"
                )
            check_basis(u, f"the basis of the region {name!r}")
            self._checked[name] = u.dtype
        return u

    def protected_basis(self, strength: str) -> Tensor | None:
        """Return an orthonormal basis of the directions that active regions of this strength protect.

        None outside training (gradients off), with adapters disabled, and where no such region is active.
        """
        if not torch.is_grad_enabled() or self.disable_adapters:
            return None
        names = [name for name in self.active_adapters if self.strengths.get(name) == strength]
        return joint_basis([self.basis(name) for name in names])

    @torch.no_grad()
    def project(self) -> None:
        """Restore the trained weights' components along the bases of all active regions."""
        names = [name for name in self.active_adapters if name in self.routed_C0]
        if not names or not any(p.requires_grad for p in self.base_layer.parameters()):
            return
        u = torch.cat([self.basis(name) for name in names], 1)
        part = torch.cat([self.routed_C0[name] for name in names])
        start = 0
        for parameter, view in _parameters(self.base_layer):
            stop = start + view(parameter).shape[1]
            if parameter.requires_grad:
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                restore_component(view(full), u, part[:, start:stop])
                if isinstance(parameter, DTensor):  # sharded by FSDP2
                    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
            start = stop


def _parameters(base: nn.Module) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Yield a layer's parameters, each with a view as columns in the residual stream: ``(d, n)``, a bias ``(d, 1)``."""
    weight: Any = base.weight
    yield weight, lambda w: w.T if isinstance(base, Conv1D | nn.Embedding) else w
    bias = getattr(base, "bias", None)
    if bias is not None:
        yield bias, lambda b: b.unsqueeze(1)


def cut_beside(writer: nn.Module, contribution: Tensor) -> Tensor:
    """Apply the gradient cut of subspace regions at a ``writer`` to a contribution that is added to its output."""
    u = writer.protected_basis("cut") if isinstance(writer, SubspaceLayer) else None
    return contribution if u is None or not contribution.requires_grad else cut_gradient(contribution, u)


def project_base(model: nn.Module) -> int:
    r"""Restore every trained writer's component along the regions' subspaces to its value when these were made.

    .. math:: W \leftarrow W - U (U^\top W - C_0), \qquad C_0 = U^\top W_0

    Call it after every optimizer step when the base itself is trained. The gradient has no component along ``U``, but
    Adam's division by elementwise moments, weight decay and rounding bring one back. `RoutedTrainer` calls it; for other
    trainers there is the callback `routed_peft.training.SubspaceProjection`. A second call changes no more than rounding.

    Args:
        model: a model with active regions of ``kind="subspace"``.

    Returns:
        The number of layers visited.
    """
    layers = [module for module in model.modules() if isinstance(module, SubspaceLayer)]
    for layer in layers:
        layer.project()
    return len(layers)


def has_subspace(model: nn.Module) -> bool:
    """Return whether a model has a region that keeps its base from learning along a subspace."""
    return any(isinstance(module, SubspaceLayer) and module.strengths for module in model.modules())


class ProtectedEmbedding(nn.Module, SubspaceLayer):
    """An embedding whose output's gradient loses its component along the regions' subspaces; the value stays as it is.

    Args:
        base_layer: the embedding; of tokens, or of positions.
        adapter_name: name of the first region.
        config: its configuration.
        basis: ``(d, k)``, or None where it is about to be loaded.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("routed_U", "routed_C0")

    def __init__(
        self, base_layer: nn.Embedding, adapter_name: str, *, config: RoutedConfig, basis: Tensor | None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self._init_subspaces()
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.protect(adapter_name, config, basis)
        self.train(base_layer.training)

    def protect(self, adapter_name: str, config: RoutedConfig, basis: Tensor | None) -> None:
        """Keep the embedding from learning along one more region's basis."""
        self._add_basis(adapter_name, config, basis=basis, width=self.embedding_dim)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embedding's own output."""
        y: Tensor = self.base_layer(*args, **kwargs)
        # both strengths: nothing but the table is upstream of this output
        bases = [u for u in (self.protected_basis("cut"), self.protected_basis("weights")) if u is not None]
        u = joint_basis(bases)
        return y if u is None or not y.requires_grad else cut_gradient(y, u)

    def check_mergeable(self) -> None:
        """Accept: no part of a region is ever merged into an embedding."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge nothing: the embedding holds no part of a region."""

    def unmerge(self) -> None:
        """Do nothing, as `merge` does."""
