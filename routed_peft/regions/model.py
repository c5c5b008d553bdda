"""`RoutedModel`: the PEFT tuner that puts regions into a model and takes them out again."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from routed_peft.adapters import adapters_in
from routed_peft.architectures import MLP_TARGETS, is_writer, layer_index, model_type
from routed_peft.regions.attentions import set_heads
from routed_peft.regions.config import KINDS, RoutedConfig
from routed_peft.regions.embeddings import share_tables, untie_tables
from routed_peft.regions.fingerprint import check_fingerprint
from routed_peft.regions.heads import RoutedHeads, plan_heads
from routed_peft.regions.hidden_units import check_uniform, pad_to_widest
from routed_peft.regions.layer import RoutedLayer
from routed_peft.regions.linear import LowRankLinear
from routed_peft.regions.mlp import RoutedMLP
from routed_peft.regions.peft_type import PREFIX
from routed_peft.regions.subspace import ProtectedEmbedding
from routed_peft.regions.targets import RegionPlan, input_embeddings, unwrapped
from routed_peft.regions.whole import plan_region
from routed_peft.routes import check_region_name


class RoutedModel(BaseTuner):
    """Puts regions into a model. Made by ``get_peft_model(base, RoutedConfig(...), adapter_name="forget")``.

    Raises:
        ValueError: on a name with a meaning of its own in PEFT, TRL or Trainer, an unsupported architecture, targets that
            match nothing, or a base other than the one that the region was trained on. The model is then unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=4, intermediate_size=6, num_attention_heads=1, vocab_size=8)
        >>> base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> tuner = RoutedModel(base, RoutedConfig(size=2), "forget")  # get_peft_model wraps this in a PeftModel
        >>> [tuple(p.shape) for p in tuner.parameters() if p.requires_grad]
        [(2, 4), (2, 4), (4, 2)]
        >>> tuner.merge_and_unload().config.intermediate_size
        8
    """

    prefix = PREFIX
    tuner_layer_cls = RoutedLayer
    target_module_mapping = MLP_TARGETS
    _plan: RegionPlan

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config  # `inject_adapter` has completed it

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the region ``adapter_name``: check everything, then complete its configuration, then change the model."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, RoutedConfig)
        if not (config.inference_mode and adapter_name == "default"):  # PEFT loads a nameless adapter under this name
            check_region_name(adapter_name)
        if config.base_fingerprint is not None:
            check_fingerprint(model, config.base_fingerprint)
        parts = plan_region(model, config)
        try:
            for part in parts:
                self.peft_config[adapter_name], self._plan = part.config, part.plan
                with unwrapped(model, part.config.kind):
                    super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            self.peft_config[adapter_name] = config
        share_tables(model, adapter_name)
        if config.kind == "subspace":
            self._protect_embeddings(model, adapter_name, config)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Accept: tables that a model ties share a region's rows, or are untied by a merge."""

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []

    def _protect_embeddings(self, model: nn.Module, adapter_name: str, config: RoutedConfig) -> None:
        lowest = min(index for target in self._plan.targets if (index := layer_index(target)) is not None)
        basis = self._plan.basis(lowest)
        assert config.provenance is not None
        for path, embedding in input_embeddings(model, config.provenance["width"]).items():
            if isinstance(embedding, ProtectedEmbedding):
                embedding.protect(adapter_name, config, basis)
            else:
                parent, _, child = path.rpartition(".")
                protected = ProtectedEmbedding(embedding, adapter_name, config=config, basis=basis)
                protected.set_adapter(self.active_adapters)
                setattr(model.get_submodule(parent), child, protected)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, RoutedConfig)
        make = RoutedMLP if peft_config.kind == "mlp" else KINDS[str(peft_config.kind)].layer
        if make is not None:
            same = isinstance(target, make) if isinstance(make, type) else True  # and not one that it stands around
            if isinstance(target, RoutedLayer) and same:
                target.update_layer(adapter_name, peft_config, model=self.model)
            else:
                setattr(parent, target_name, make(target, adapter_name, config=peft_config, model=self.model))
            return
        writer = is_writer(current_key, str(model_type(self.model)))
        basis = self._plan.basis(layer_index(current_key)) if writer else None
        if isinstance(target, LowRankLinear):
            target.update_layer(adapter_name, peft_config, model=self.model, writer=writer, basis=basis)
        else:
            layer = LowRankLinear(
                target, adapter_name, config=peft_config, model=self.model, writer=writer, basis=basis
            )
            setattr(parent, target_name, layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # A region inside an MLP that another region widens is saved under the names that it has without that one.
        return super()._remove_adapter_name_from_key(key, adapter_name).replace(".base_layer.", ".")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own also copies `weight`, which an MLP lacks

    def _layers(self) -> list[RoutedLayer]:
        return [module for module in self.model.modules() if isinstance(module, RoutedLayer)]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers():
            layer.check_mergeable()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge regions, the active ones by default, so that `unmerge_adapter` restores the base exactly."""
        self._check_names(adapter_names)
        names = adapter_names or self.active_adapters
        for layer in self._layers():  # before anything is merged
            if isinstance(layer, RoutedMLP | RoutedHeads) and set(names) & set(adapters_in(layer)):
                layer.check_unwrapped()
        untie_tables(self.model, names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_names(self, adapter_names: list[str] | None) -> None:
        unknown = [name for name in adapter_names or () if name not in self.peft_config]
        if unknown:
            raise ValueError(f"`adapter_names` holds {unknown}; this model has the regions {list(self.peft_config)}")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """Return the plain model: with ``merge`` the named regions are part of it, and all others are gone.

        Regions merged earlier are unmerged first, so that the result depends on this call alone: `unload` gives the original
        weights, and no region outside ``adapter_names`` stays.
        """
        names = adapter_names
        if merge:
            self._check_names(adapter_names)
            if names is None:
                merged = [name for layer in self._layers() for name in layer.merged_adapters]
                names = list(dict.fromkeys([*merged, *self.active_adapters]))
            self._check_merge_allowed()
        for layer in self._layers():
            layer.unmerge()
        widens = merge and any(name in layer.routed_up for layer in self._mlps() for name in names or ())
        if widens:  # all layers are unmerged now, so a refusal leaves the model whole
            check_uniform(self.model)
        heads = plan_heads(self.model, names or []) if merge else None
        untied = merge and untie_tables(self.model, names or [])
        inner_first = sorted(self.model.named_modules(), key=lambda item: -item[0].count("."))
        for path, layer in inner_first:  # PEFT's own loop does not look inside its layers
            if isinstance(layer, RoutedLayer):
                if merge:
                    layer.merge(safe_merge=safe_merge, adapter_names=names)
                parent, _, child = path.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.base_layer)
        super()._unload_and_optionally_merge(False, progressbar)
        if untied:
            model: Any = self.model
            model.config.tie_word_embeddings, model.all_tied_weights_keys = False, {}
        if widens:
            pad_to_widest(self.model)
        if heads is not None:
            set_heads(self.model, heads)
        return self.model

    def _mlps(self) -> list[RoutedMLP]:
        return [layer for layer in self._layers() if isinstance(layer, RoutedMLP)]
