"""``kind="lora"`` and ``kind="subspace"``: low-rank updates of a linear layer, one per region."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from routed_peft.architectures import is_plain, width
from routed_peft.regions.config import RoutedConfig
from routed_peft.regions.projections import cut_gradient, project_off
from routed_peft.regions.subspace import SubspaceLayer


class LowRankLinear(nn.Module, SubspaceLayer):
    r"""A linear layer and the low-rank updates of regions.

    .. math:: y = W x + b + \sum_l \tfrac{\alpha_l}{r_l} B_l A_l x + \sum_s U_s M_s \, \mathrm{sg}(x)

    summed over the active regions ``l`` of kind lora (LoRA, arXiv 2106.09685) and ``s`` of kind subspace, with the
    stop-gradient ``sg``. LoRA is computed as in PEFT, so that the two agree bit for bit. A lora with a `subspace` stays off
    it: :math:`P_\perp B A`. Regions compute in the dtype of their own weights.

    While gradients are on, an active subspace region of strength ``"cut"`` removes the component along its basis from the
    gradient of everything but itself. One of strength ``"weights"`` removes it from the gradients of ``W`` and ``b`` only.

    Args:
        base_layer: an ``nn.Linear`` or ``Conv1D``, possibly quantized.
        adapter_name: name of the first region.
        config: its configuration.
        model: the model that the layer belongs to.
        writer: whether the layer writes into the residual stream.
        basis: ``(d, k)`` where the region has a subspace at this layer; None otherwise, or where it is to be loaded.
    """

    # "Linear" in the name of the class is how PEFT's "all-linear" tells wrapped linear layers from others.
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "routed_M")
    other_param_names: tuple[str, ...] = ("routed_U", "routed_C0")
    region_outlets: ClassVar[tuple[str, ...]] = ("lora_B", "routed_M")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: RoutedConfig,
        model: nn.Module,
        writer: bool = False,
        basis: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = width(base_layer, "in"), width(base_layer, "out")
        self.lora_A, self.lora_B, self.routed_M = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._init_subspaces()
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, model=model, writer=writer, basis=basis)
        self.train(base_layer.training)

    def update_layer(
        self,
        adapter_name: str,
        config: RoutedConfig,
        *,
        model: nn.Module,
        writer: bool = False,
        basis: Tensor | None = None,
    ) -> None:
        """Add the region ``adapter_name`` on the device of the layer; its contribution starts at zero."""
        assert adapter_name not in self.lora_A and adapter_name not in self.routed_M
        if config.kind == "lora":
            assert config.r is not None and config.lora_alpha is not None
            self.scaling[adapter_name] = config.lora_alpha / config.r
            self.lora_A[adapter_name] = nn.Linear(self.in_features, config.r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(config.r, self.out_features, bias=False)
            nn.init.kaiming_uniform_(self._linear("lora_A", adapter_name).weight, a=math.sqrt(5))
            nn.init.zeros_(self._linear("lora_B", adapter_name).weight)
        else:
            assert config.provenance is not None
            m = nn.Linear(self.in_features, config.provenance["k"], bias=False, dtype=self._precision())
            nn.init.zeros_(m.weight)
            self.routed_M[adapter_name] = m
        if config.provenance is not None and (writer or config.kind == "subspace"):
            self._add_basis(adapter_name, config, basis=basis, width=self.out_features)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the contributions of the active regions; ``x`` is ``(..., D)``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self._base(x, *args, **kwargs)
        dtype, present = result.dtype, self._present()
        for name in present:
            if name in self.lora_A:
                result = result + self._lora(name, x)
        u = self.protected_basis("cut")
        if u is not None and result.requires_grad:
            result = cut_gradient(result, u)
        for name in present:
            if name in self.routed_M:
                result = result + self._along(name, x)
        return result.to(dtype)

    def _present(self) -> list[str]:
        if self.disable_adapters:
            return []
        known = self._get_available_adapters()
        return [name for name in self.active_adapters if name in known and name not in self.merged_adapters]

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        u = self.protected_basis("weights")
        if u is None or not any(p.requires_grad for p in self.base_layer.parameters()):
            return self.base_layer(x, *args, **kwargs)
        # The gradient to x is complete, that to the parameters is cut: two evaluations, whose values differ by exactly zero.
        detached = {name: p.detach() for name, p in self.base_layer.named_parameters()}
        through_x: Tensor = torch.func.functional_call(self.base_layer, detached, (x, *args), kwargs)
        through_parameters = cut_gradient(self.base_layer(x.detach(), *args, **kwargs), u)
        return through_x + (through_parameters - through_parameters.detach())

    def _lora(self, name: str, x: Tensor) -> Tensor:
        x = self._cast_input_dtype(x, self._linear("lora_A", name).weight.dtype)
        update = self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return project_off(update, self.basis(name)) if name in self.routed_U else update

    def _along(self, name: str, x: Tensor) -> Tensor:
        x = self._cast_input_dtype(x.detach(), self._linear("routed_M", name).weight.dtype)
        return nn.functional.linear(self.routed_M[name](x), self.basis(name))

    def check_mergeable(self) -> None:
        """Raise ValueError where the layer is quantized."""
        if not is_plain(self.weight):
            raise ValueError(f"regions cannot be merged into {type(self.base_layer).__name__}, whose weights are quantized "
                "or wrapped. Load the base unquantized (float32 or bfloat16), or keep the region as an adapter.")  # fmt: skip

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of regions to the layer's weight.

        Args:
            safe_merge: raise ValueError on updates that are not finite.
            adapter_names: which regions; the active ones by default.
        """
        known = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in known]
        if not names:
            return
        self.check_mergeable()
        updates = {name: self.get_delta_weight(name) for name in names}
        if safe_merge and (broken := [name for name, update in updates.items() if not update.isfinite().all()]):
            raise ValueError(f"the weights of the region {broken[0]!r} are not all finite: it was not merged")
        if self._unmerged is None:
            self._unmerged = self.weight.data.clone()  # subtracting the update would leave rounding errors
        for name, update in updates.items():
            self.weight.data += update  # in the wider of the two dtypes, then rounded
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove the updates of all merged regions; the weight is restored bit for bit."""
        if self._unmerged is not None:
            self.weight.data.copy_(self._unmerged)
            self._unmerged = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, name: str) -> Tensor:
        """Return the update of the weight by the region ``name``, in the weight's own layout: ``(D, O)`` in a Conv1D."""
        if name in self.routed_M:
            return self._oriented(self.basis(name) @ self._linear("routed_M", name).weight)
        a, b = self._linear("lora_A", name).weight, self._linear("lora_B", name).weight
        if name in self.routed_U:
            b = project_off(b.T, self.basis(name)).T
        return self._oriented(b @ a) * self.scaling[name]

    def _oriented(self, update: Tensor) -> Tensor:
        return update.t() if isinstance(self.base_layer, Conv1D) else update

    def __repr__(self) -> str:
        return "routed." + super().__repr__()
