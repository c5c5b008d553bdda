"""`RoutedModel`: the PEFT tuner that puts regions into a model and takes them out again."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from routed_peft.architectures import SUPPORTED, find_mlps, mlp_layout, verify_layout
from routed_peft.regions.config import RoutedConfig
from routed_peft.regions.fingerprint import check_fingerprint
from routed_peft.regions.mlp import RoutedLayer, RoutedMLP
from routed_peft.regions.registration import PREFIX
from routed_peft.regions.units import check_uniform, equalise
from routed_peft.routes import check_region_name

_MODEL_TYPES = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 smollm3 granite phi3 phi gpt2 gpt_neo "
    "gpt_neox falcon starcoder2 stablelm"
).split()


class RoutedModel(BaseTuner):
    """Puts regions into a model. Made by ``get_peft_model(base, RoutedConfig(...), adapter_name="forget")``.

    Raises:
        ValueError: on a name that PEFT, TRL or Trainer give a meaning, an unsupported architecture, targets that match
            nothing, or a base that is not the one that the region was trained on. The model is then unchanged.

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
    target_module_mapping = {model_type: ["mlp"] for model_type in _MODEL_TYPES}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, RoutedConfig)
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in self.target_module_mapping:
                found = sorted({name.rpartition(".")[2] for name in find_mlps(self.model)})
                raise ValueError(
                    f"no default `target_modules` for the model type {model_type!r}: "
                    + (
                        f"pass them, for example {found}"
                        if found
                        else f"it has no supported MLP. Supported: {SUPPORTED}"
                    )
                )
            peft_config.target_modules = list(self.target_module_mapping[model_type])
        return peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the region ``adapter_name`` to ``model``, after checks that leave it unchanged where they fail."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, RoutedConfig)
        if not (config.inference_mode and adapter_name == "default"):  # the name that stock loading gives, unasked
            check_region_name(adapter_name)
        self._check_targets(model, config)
        if config.base_fingerprint is not None:
            check_fingerprint(model, config.base_fingerprint)
        if config.init is None:
            config.init = "zero" if getattr(model, "name_or_path", None) else "model"
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _check_targets(self, model: nn.Module, config: RoutedConfig) -> None:
        self._prepare_adapter_config(config, self.get_model_config(model))
        wrapped = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(wrapped) and self._check_target_module_exists(config, name)
        }
        if not targets:
            raise ValueError(
                f"`target_modules` = {config.target_modules} (`exclude_modules` = {config.exclude_modules}, "
                f"`layers_to_transform` = {config.layers_to_transform}) match no module of {type(model).__name__}. "
                f"Its supported MLPs: {list(find_mlps(model)) or 'none'}. Supported layouts: {SUPPORTED}."
            )
        verified: set[type] = set()
        for module in targets.values():
            mlp = module.base_layer if isinstance(module, RoutedMLP) else module
            layout = mlp_layout(mlp)
            if type(mlp) not in verified:
                verified.add(type(mlp))
                verify_layout(mlp, layout)

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
        if isinstance(target, RoutedLayer):
            target.update_layer(adapter_name, peft_config, self.model)
        else:
            setattr(parent, target_name, RoutedMLP(target, adapter_name, peft_config, self.model))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own goes on to copy `weight`, which an MLP has not

    def _layers(self) -> list[RoutedLayer]:
        return [module for module in self.model.modules() if isinstance(module, RoutedLayer)]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self._layers():
            layer.check_mergeable()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge regions, the active ones by default, in a way that `unmerge_adapter` undoes exactly."""
        self._check_names(adapter_names)
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
        """Leave a plain model: with ``merge`` the named regions are part of it, all others are gone.

        Regions merged earlier are unmerged first, so that what is asked for here is what comes out: `unload` gives the
        original weights, and no region outside ``adapter_names`` stays.
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
        if merge:
            check_uniform(self.model)
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, names)
        if merge:
            equalise(self.model)
        return self.model
