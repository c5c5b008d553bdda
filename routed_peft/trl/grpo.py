"""`RoutedGRPOTrainer`: TRL's GRPO with gradients routed by the label of each rollout."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from routed_peft.adapters import adapter_names
from routed_peft.data.columns import ROUTE_ENVIRONMENT
from routed_peft.routes import IGNORED, Routes
from routed_peft.trl.config import RoutedGRPOConfig
from routed_peft.trl.mixin import check_arguments, check_grpo_arguments, with_adapters, with_anchor_route
from routed_peft.trl.rollout_labels import labels_from_dataset
from routed_peft.trl.rollouts import LabelFunction, Rollouts, nest_weights, rollout_metrics, unflagged_advantages
from routed_peft.trl.sampling import OriginalModel, SamplingMixin

logger = logging.getLogger(__name__)


class RoutedGRPOTrainer(SamplingMixin):
    r"""`trl.GRPOTrainer` that routes gradients by the label of each rollout or token; everything else is TRL's.

    With :math:`\ell_i` the loss of rollout i, :math:`m_g(i)` the weight of group g (the base or a region) in the route of
    its label, every group's gradient is :math:`\sum_i m_g(i)\, \nabla_g \ell_i`. Each rollout keeps its label for as long
    as TRL reuses it.

    A rollout is sampled with all regions on; a share of the prompts (``anchor_share``) with all of them ablated. Where a
    rollout's loss sees other regions than it was sampled with, the old log-probabilities are computed as it was sampled,
    so that importance ratios stay correct. With ``beta > 0`` the reference is the original model: every adapter off, which
    takes a frozen base, or ``ref_model``. The KL term of a rollout is routed with it. ``loss_type="dapo"`` divides by the
    tokens of all rollouts, whatever their labels.

    Args:
        model: a PeftModel; or a model, path or Hub id together with ``peft_config``.
        train_dataset: as for TRL; its columns reach ``label_fn``.
        routes: label -> `Route`; `presets.classic` and `presets.exclusive` are the published ones.
        label_fn: labels rollouts; called by keyword with the attributes of `Rollouts` and the dataset's columns, and
            returns one label each, one label per token each, or `RolloutLabels`. By default the column ``route_label``.
        ref_model: the reference for ``beta > 0`` where the base is trained.
        peft_config: ``{adapter name: config}``.
        **kwargs: as for `trl.GRPOTrainer`.

    Raises:
        ValueError: where routing cannot be attached, and on options that routing would make wrong: see ``docs/rl.md``.
    """

    labels_in_rows = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RoutedGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *,
        routes: Routes,
        label_fn: LabelFunction | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = check_grpo_arguments(args, ref_model, kwargs)
        quantization_config = kwargs.pop("quantization_config", None)
        model = with_adapters(model, peft_config, args=args, quantization_config=quantization_config)
        check_arguments(args, model)
        # With `beta` set, TRL would copy an adapter called `default` for a reference.
        beta, args.beta = args.beta, 0.0
        try:
            super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        finally:
            args.beta = beta
        if args.use_vllm and self.is_fsdp_enabled:
            raise ValueError("`use_vllm` with FSDP: adapters cannot be folded into sharded weights; use DDP")
        if args.anchor_share and args.use_vllm and self.accelerator.num_processes > 1:
            raise ValueError("`anchor_share` with `use_vllm` in several processes: their shares of anchors differ, and "
                             "TRL's engine wants equal ones. Use one process, ordinary generation, or no anchors")  # fmt: skip
        if args.anchor_share and (self._is_vlm or self.tools):
            raise ValueError("`anchor_share` with images or tools: TRL regroups their rows; sample without anchors")
        self.label_fn = label_fn or labels_from_dataset(train_dataset, self.eval_dataset)
        self.beta, self.ref_model = beta, self._reference(ref_model) if beta else None  # type: ignore[assignment]
        self._check_environments()
        args.continue_run(self.model)
        regions = [name for name in adapter_names(self.model) if name not in args.base_adapters]
        self._attach(with_anchor_route(routes, regions, args))
        self._check_dropout()
        self._attach_engine()

    def _reference(self, model: PreTrainedModel | None) -> OriginalModel | PreTrainedModel:
        if model is None:
            return OriginalModel()
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        add_fused_lm_head(model, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    # Labels

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._anchor = self._draw_anchors(inputs)
        try:
            return self._with_labels(super()._generate_and_score_completions(inputs))
        finally:
            self._anchor = None

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = (inputs, prompts, completions, completion_ids_list, rewards)  # rewards: of all processes
        return rewards

    def _with_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add labels and weights to a generation batch, and advantages and old log-probabilities where routing changes them."""
        (rows, *_, per_func), routes, flagged = self._scored, self.routing.routes, self.args.flagged_labels
        rewards = (per_func * self.reward_weights.to(per_func.device)).nansum(dim=1)  # (N,), over all processes
        rewards = rewards.masked_fill(per_func.isnan().all(dim=1), torch.nan)  # where no function gave one
        answer = self._rollouts(batch, rewards).label(self.label_fn, routes, flagged)
        unflagged = self.args.baseline_over == "unflagged"
        if answer.advantages is not None and unflagged:
            raise ValueError('`label_fn` returned advantages of its own, and `baseline_over="unflagged"` makes others: set it '
                             'to "group"')  # fmt: skip
        if unflagged and self.model.training:
            batch["advantages"] = self._unflagged_advantages(rewards, answer.flagged(flagged))
        tensors = answer.tensors(routes, batch)
        batch |= tensors
        labels = next(iter(tensors.values())).view(len(rows), -1)  # by example or by token
        environments = self._environments(rows)
        if None not in environments:
            batch[ROUTE_ENVIRONMENT] = [str(name) for name in environments]  # for monitoring
        if self.model.training and self._regions_differ(labels) and "old_per_token_logps" not in batch:
            self._check_no_dropout("a label whose route ablates other regions than the sampler")
            batch["old_per_token_logps"] = self._sampled_logps(batch)
        counts = torch.stack([(self._has_loss(batch).cpu() & (labels == i)).sum() for i in range(len(routes))])
        self._record(answer.first_labels(), rewards, counts=counts, environments=environments)
        return batch

    def _rollouts(self, batch: Mapping[str, Any], rewards: Tensor) -> Rollouts:
        rows, prompts, completions, ids, per_func = self._scored
        numbers = lambda values: [None if v != v else v for v in self._own_rows(values, len(rows)).tolist()]
        return Rollouts(
            rows=self._with_class_names(rows),
            prompts=prompts,
            completions=completions,
            completion_ids=ids,
            rewards=numbers(rewards),
            rewards_per_func={name: numbers(per_func[:, i]) for i, name in enumerate(self.reward_func_names)},
            advantages=batch["advantages"].tolist(),
            anchor=self._anchor.tolist(),
            generation=(*self._moment(), self.accelerator.process_index),
        )

    def _unflagged_advantages(self, rewards: Tensor, flags: list[bool]) -> Tensor:
        flagged = self.accelerator.gather(torch.tensor(flags, device=rewards.device))
        size, scale = self.num_generations, self.args.scale_rewards
        advantages = unflagged_advantages(rewards, flagged, num_generations=size, scale_rewards=scale)
        log = self._logs["advantages"]  # TRL has logged its own
        for _ in range(len(advantages)):
            log.pop()
        log.extend(advantages.tolist())
        return self._own_rows(advantages, len(flags))

    def _regions_differ(self, labels: Tensor) -> bool:
        """Return whether any rollout, in any process, has other regions in its loss than when it was sampled."""
        differs = torch.zeros(1, dtype=torch.bool)
        for region in self.routing.regions:
            absent = torch.tensor([region in route.ablated for route in self.routing.routes.values()])
            differs |= ((absent[labels.clamp(min=0)] != self._anchor.unsqueeze(1)) & (labels != IGNORED)).any()
        return bool(self.accelerator.gather(differs.to(self.args.device)).any())

    def _record(self, labels: list[str], rewards: Tensor, *, counts: Tensor, environments: list[Any]) -> None:
        """Append to TRL's metrics and to its table of completions; ``counts`` are the tokens of each label."""
        mode, device = "train" if self.model.training else "eval", self.args.device
        labels, tokens = self._gather(labels), self.accelerator.reduce(counts.to(device), "sum").tolist()
        metrics = rollout_metrics(
            labels,
            rewards.cpu(),
            anchor=self.accelerator.gather(self._anchor.to(device)).cpu(),
            tokens=dict(zip(self.routing.routes, tokens, strict=True)),
            flagged=self.args.flagged_labels,
            environments=self._gather(environments),
        )
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        self._logs["extra"]["route_label"].extend(labels)

    # Steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Do one forward and backward pass under the routes of the rollouts, generating them when they are used up."""
        start = time.perf_counter()
        if not model.training:  # Trainer walks through all modules again
            model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # as Trainer does, before it generates
        batch = nest_weights(self._prepare_inputs(inputs))
        self._current_train_step_time += time.perf_counter() - start
        return super().training_step(model, batch, num_items_in_batch)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        prepared = isinstance(generation_batch, dict)
        return generation_batch if prepared else super()._prepare_inputs(generation_batch)

    def _has_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        return nn.functional.pad(
            mask, (inputs["prompt_mask"].shape[1] - 1, 1)
        ).bool()  # position i predicts token i + 1

    def _check_routing(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        # Equal rewards in a group give zero advantages and gradients, so the check uses advantages of one.
        checked = {name: value for name, value in inputs.items() if name != "old_per_token_logps"}
        super()._check_routing(model, {**checked, "advantages": torch.ones_like(inputs["advantages"])})

    def _check_before_training(self) -> None:
        pass  # labels come with the rollouts

    def _check_under_way(self) -> None:
        pass  # a detector may have found nothing so far

    def _check_after_training(self) -> None:
        try:
            self._check_labels_occur(self.tokens_per_route)
        except ValueError as error:  # a detector may have found nothing
            logger.warning("over this run, %s", error)

    # Evaluation

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Generate and evaluate one batch, as TRL does."""
        return GRPOTrainer.prediction_step(self, *args, **kwargs)
