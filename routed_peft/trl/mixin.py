"""Mix-in of the routed SFT and GRPO trainers, checks of their models and arguments, and weights for vLLM."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import create_model_from_path

from routed_peft.adapters import adapter_names, adapters_in, tuner_layers
from routed_peft.routes import Route, Routes
from routed_peft.routing.groups import JOINT
from routed_peft.training import RoutingMixin
from routed_peft.training.region_schedule import RegionSchedule
from routed_peft.trl.config import RoutedGRPOConfig
from routed_peft.trl.rollouts import ANCHOR

logger = logging.getLogger(__name__)


class TRLMixin(RoutingMixin):
    """`RoutingMixin` for trainers whose loss reads the head's weight directly (TRL's fused LM head)."""

    _metrics: dict[str, defaultdict[str, list[float]]]
    _evaluates_ablated = False

    def _attach(self, routes: Routes | RegionSchedule) -> None:
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            for p in self.model.parameters():  # TRL has made the adapters bfloat16, too coarse for small updates
                p.data = p.data.float() if p.requires_grad else p.data
        super()._attach(routes)
        if isinstance(self.model.get_output_embeddings(), BaseTunerLayer):  # type: ignore[operator]
            raise ValueError("TRL's fused head reads the head's own weight, past the rows that a region has there: leave "
                             "`embeddings` out of the region's configuration, or train it with `RoutedTrainer`")  # fmt: skip
        # the head and what is tied to it stay frozen, because the fused head reads its weight past the routing
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        free = {id(p) for p in self.routing.parameters(JOINT)}
        passed_by = [p for p in head.parameters() if p.requires_grad and id(p) not in free] if head is not None else []
        for p in passed_by:
            p.requires_grad_(False)
        if passed_by:
            logger.warning("the output embeddings, and input embeddings tied to them, stay frozen: TRL's fused head "
                           "reads their weight past the routing. To train them from all data, whatever its label, name "
                           "`head` in `joint` (with `embeddings`, if tied).")  # fmt: skip

    def _check_routing(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        # TRL's losses update counters; those of the check are no part of the run.
        saved = copy.deepcopy({name: value for name, value in vars(self).items() if name in _COUNTERS})
        try:
            super()._check_routing(model, inputs)
        finally:
            vars(self).update(saved)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run the loop; TRL's own metrics of the ablated model are named ``eval_ablated_…``."""
        self._evaluates_ablated = kwargs.get("metric_key_prefix", "eval").startswith("eval_ablated")
        try:
            output = super().evaluation_loop(*args, **kwargs)
            if self._evaluates_ablated:
                metrics = self._metrics["eval"]
                for name in list(metrics):
                    metrics[f"ablated_{name}"] = metrics.pop(name)
            return output
        finally:
            self._evaluates_ablated = False


_COUNTERS = ("_metrics", "_total_train_tokens", "_entropy_window_stats", "entropy_coef", "_last_world_entropy")


def check_arguments(args: Any, model: Any) -> None:
    """Raise ValueError on options that no routed TRL trainer supports, before TRL builds anything."""
    if args.use_liger_kernel:
        raise ValueError("`use_liger_kernel` reads weights outside their modules, past the routing: set it to False")
    if isinstance(model, nn.Module):
        args.continue_run(model)
    if args.train_base and getattr(args, "cast_lm_head_to_fp32", False):
        raise ValueError("`cast_lm_head_to_fp32` with `train_base=True`: a head with a forward of its own goes by the "
                         "routing. Load the model in float32 and train with `bf16=True`")  # fmt: skip
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel | PeftModel) else None
    if isinstance(head, BaseTunerLayer):
        raise ValueError("an adapter sits on the output embeddings (`lm_head`), which TRL's fused head reads past it: leave "
                         "`lm_head` out of `target_modules`")  # fmt: skip
    if getattr(args, "use_vllm", False):
        check_foldable(model, adapter_names(model))


def check_grpo_arguments(args: Any, ref_model: Any, kwargs: Mapping[str, Any]) -> RoutedGRPOConfig:
    """Return the configuration of a GRPO trainer; raise ValueError on options that routing would make wrong or useless."""
    if not isinstance(args, RoutedGRPOConfig):
        raise ValueError(f"`args` is a `RoutedGRPOConfig`, got {type(args).__name__}")
    if args.beta and args.train_base and ref_model is None:
        raise ValueError("`beta > 0` with `train_base=True`: the base moves, so no original is left to be the "
                         "reference. Pass it as `ref_model` (a second copy of the model), or set `beta=0.0`")  # fmt: skip
    if ref_model is not None and not args.beta:
        raise ValueError("`ref_model` is given, but `beta` is 0, so it would not be used: set `beta`, or leave it out")
    if args.sync_ref_model:
        raise ValueError("`sync_ref_model` would move the reference, which is the original model: set it to False")
    if args.activation_l1:
        raise ValueError("`activation_l1` is part of ERA's pretraining; it has no meaning in GRPO: set it to 0")
    if args.anchor_share and kwargs.get("rollout_func") is not None:
        raise ValueError("`anchor_share` with `rollout_func`: your function would have to ablate the regions itself")
    return args


def with_anchor_route(routes: Routes, regions: Sequence[str], args: RoutedGRPOConfig) -> Routes:
    """Return ``routes`` with one for anchor rollouts where ``args`` asks for them; raise where its anchors would be wrong."""
    flagged = args.flagged_labels
    if args.anchor_share:
        routes = {**routes, ANCHOR: routes.get(ANCHOR, Route(ablated=tuple(regions)))}
        if set(routes[ANCHOR].ablated) != set(regions):
            raise ValueError(f"anchor rollouts are sampled without any region, so the route of {ANCHOR!r} ablates all of "
                             f"{list(regions)}; got {routes[ANCHOR]}")  # fmt: skip
        taught = {name for name, route in routes.items() if name != ANCHOR and not route.weight("base")}
        if missing := sorted(taught - set(flagged)):
            raise ValueError(f"an anchor rollout with the label {missing[0]!r} would train the base, which the route of "
                             f"{missing[0]!r} does not: add {missing} to `flagged_labels`, now {flagged}")  # fmt: skip
    if args.baseline_over == "unflagged" and not set(flagged) & set(routes):
        raise ValueError(f'`baseline_over="unflagged"`: none of `flagged_labels` {flagged} is a label of `routes`, which has '
                         f"{list(routes)}")  # fmt: skip
    return routes


def with_adapters(model: Any, peft_config: Any, *, args: Any, quantization_config: Any = None) -> nn.Module | str:
    """Return ``model``, also a path or Hub id, with the adapters of ``peft_config`` in order; as it is where that is None."""
    if peft_config is None:
        if not isinstance(model, nn.Module) or not getattr(model, "peft_config", None):
            raise ValueError("this model has no adapters, so no region: pass a PeftModel, or "
                             '`peft_config={"forget": LoraConfig(…)}` with the name of each adapter')  # fmt: skip
        return model
    if not isinstance(peft_config, Mapping) or not peft_config:
        raise ValueError(f"`peft_config` maps adapter names to configurations, got {type(peft_config).__name__}: regions "
                         'have names of their own, so write `peft_config={"forget": LoraConfig(…)}`')  # fmt: skip
    if getattr(model, "peft_config", None):
        raise ValueError("the model has adapters already: pass either a PeftModel or `peft_config`, not both")
    set_seed(args.seed)
    if isinstance(model, str):
        kwargs = {"trust_remote_code": args.trust_remote_code} | dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
            kwargs["device_map"] = None  # as TRL does: "auto" fails there
        model = create_model_from_path(model, **kwargs)
    (first, config), *others = peft_config.items()
    wrapped = get_peft_model(model, config, adapter_name=first)
    for name, config in others:
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(list(peft_config))  # type: ignore[operator]
    return wrapped


def check_foldable(model: nn.Module, adapters: Collection[str]) -> None:
    """Refuse adapters that are more than an update of a weight: the engine has the base's shapes and operations only."""
    for name, layer in tuner_layers(model):
        here = set(adapters_in(layer)) & set(adapters)
        biased = isinstance(layer, LoraLayer) and any(layer.lora_bias.get(adapter) for adapter in here)
        if here and (biased or not hasattr(layer, "get_delta_weight")):
            raise ValueError(f"`use_vllm` with the adapter {min(here)!r}: {name!r} is no linear update of a weight "
                             "(`kind=\"mlp\"` adds hidden units), so it cannot be folded into the engine's weights. "
                             'Take `kind="lora"` or "subspace" (without bias), or set `use_vllm=False`')  # fmt: skip


@torch.no_grad()
def folded_parameters(model: nn.Module, adapters: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    r"""Yield every parameter of the base under the name it has without adapters, :math:`W + \sum_a \Delta W_a`.

    They are the weights for a vLLM engine (tested with a stand-in for it only). The model is not touched: merging and
    unmerging, as TRL does, would leave rounding errors in the base. Regions left out of ``adapters`` are ablated there.

    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]), "forget")
    >>> [name for name, _ in folded_parameters(model, ["forget"])]
    ['0.weight', '0.bias']
    """
    updated: dict[str, tuple[Any, list[str]]] = {}
    own: tuple[str, ...] = ()
    for name, layer in tuner_layers(model):
        here = adapters_in(layer)
        updated[f"{name}.base_layer.weight"] = (layer, [adapter for adapter in adapters if adapter in here])
        own += tuple(f"{name}.{attribute}." for attribute in (*layer.adapter_layer_names, *layer.other_param_names))
    for name, p in model.named_parameters():
        if name.startswith(own):
            continue
        owner, folded = updated.get(name, (None, []))
        value = p.data
        for adapter in folded:
            value = value + owner.get_delta_weight(adapter).to(value.device, value.dtype)
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), value
