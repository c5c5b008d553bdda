"""Mix-in of the routed SFT and GRPO trainers, and checks of their models and arguments."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.utils import create_model_from_path

from routed_peft.routes import Routes
from routed_peft.routing.groups import JOINT
from routed_peft.training import RoutingMixin
from routed_peft.trl.config import RoutedGRPOConfig

logger = logging.getLogger(__name__)


class TRLMixin(RoutingMixin):
    """`RoutingMixin` for trainers whose loss reads the head's weight directly (TRL's fused LM head)."""

    _metrics: dict[str, defaultdict[str, list[float]]]
    _evaluates_ablated = False

    def _attach(self, routes: Routes) -> None:
        if getattr(self.model, "is_loaded_in_4bit", False) or getattr(self.model, "is_loaded_in_8bit", False):
            for p in self.model.parameters():  # TRL has made the adapters bfloat16, too coarse for small updates
                p.data = p.data.float() if p.requires_grad else p.data
        super()._attach(routes)
        # the head and what is tied to it stay frozen, because the fused head reads its weight past the routing
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        free = {id(p) for p in self.routing.parameters(JOINT)}
        passed_by = [p for p in head.parameters() if p.requires_grad and id(p) not in free] if head is not None else []
        for p in passed_by:
            p.requires_grad_(False)
        if passed_by:
            logger.warning(
                "the output embeddings, and input embeddings tied to them, stay frozen: TRL's fused head reads their weight "
                "past the routing. To train them from all data, whatever its label, name `head` in `joint` (with "
                "`embeddings`, if tied)."
            )

    def _check_routing(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        # TRL's losses update counters; those of the check are no part of the run.
        counters = {name: value for name, value in vars(self).items() if name in _COUNTERS}
        saved = copy.deepcopy(counters)
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
    if isinstance(model, nn.Module):
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel | PeftModel) else None
        if isinstance(head, BaseTunerLayer):
            problem = "an adapter sits on the output embeddings (`lm_head`), which TRL's fused head reads past it"
            raise ValueError(f"{problem}: leave `lm_head` out of `target_modules`")


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


def with_adapters(model: Any, peft_config: Any, *, args: Any, quantization_config: Any = None) -> nn.Module | str:
    """Return ``model`` with the adapters of ``peft_config``, which maps names to configurations.

    ``model`` is a PeftModel where ``peft_config`` is None, otherwise a transformers model, or a path or Hub id. Adapters are
    added in the order of ``peft_config``.
    """
    if peft_config is None:
        if not isinstance(model, nn.Module) or not getattr(model, "peft_config", None):
            remedy = 'pass a PeftModel, or `peft_config={"forget": LoraConfig(…)}` with the name of each adapter'
            raise ValueError(f"this model has no adapters, so no region: {remedy}")
        return model
    if isinstance(peft_config, PeftConfig) or not isinstance(peft_config, Mapping) or not peft_config:
        raise ValueError(
            f"`peft_config` maps adapter names to configurations, got {type(peft_config).__name__}: regions have names of "
            'their own, so write `peft_config={"forget": LoraConfig(…)}`'
        )
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
