"""Mix-in that adds routing to a Trainer: labels in every step, idle groups, evaluation with regions ablated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from routed_peft.ablation import ablated
from routed_peft.checkpoint.save import check_kept_regions
from routed_peft.data import RoutedCollator
from routed_peft.data.columns import ALL_COLUMNS, ROUTE_COLUMNS
from routed_peft.data.padding import check_batch
from routed_peft.losses import check_finite
from routed_peft.regions.subspace import has_subspace
from routed_peft.routes import IGNORED, Routes
from routed_peft.routing.gradient_routing import GradientRouting
from routed_peft.training.activation_penalty import activation_l1
from routed_peft.training.callbacks import SubspaceProjection, single_on_evaluate
from routed_peft.training.changing_dataset import ChangingDataset
from routed_peft.training.consistency import ScheduleMixin
from routed_peft.training.labeled_loaders import LabeledLoadersMixin
from routed_peft.training.optimizer import clip_by_group, clips_by_group, drop_idle_gradients, tag_groups
from routed_peft.training.region_schedule import RegionSchedule
from routed_peft.training.saving import SavingMixin
from routed_peft.training.token_loss import TokenLossMixin


class _IdleGradients(TrainerCallback):
    """Drops gradients of groups that no data has trained since the last step; runs between clipping and the optimizer."""

    def __init__(self, trainer: RoutingMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._drop_idle_gradients()


class BatchObserver(Protocol):
    """Observer of every batch just before it is trained on, such as a `routed_peft.monitoring.RegionMonitor`."""

    def observe(self, inputs: Mapping[str, Any], environments: Any) -> None:
        """Take a batch without its route columns; ``environments`` is its column ``route_environment``, or None."""


class RoutingMixin(ScheduleMixin, LabeledLoadersMixin, SavingMixin, TokenLossMixin):
    """Routing for a Trainer, shared by `RoutedTrainer` and TRL's trainers."""

    optimizer: torch.optim.Optimizer
    observer: BatchObserver | None = None
    _watched: torch.optim.Optimizer | None = None

    # Setting up

    def _attach(self, routes: Routes | RegionSchedule) -> None:
        """Attach the routing; called at the end of the Trainer's constructor."""
        self._refuse_unsupported()
        self._route(self.model, self._take_schedule(routes))
        self.add_callback(_IdleGradients(self))
        if has_subspace(self.model):
            self.add_callback(SubspaceProjection())
        if isinstance(self.train_dataset, ChangingDataset):
            self.add_callback(self.train_dataset.callback(self))

    def _route(self, model: nn.Module, routes: Routes) -> None:
        """Attach the routing to the model that this trainer trains from now on."""
        args = self.args
        args.continue_run(model)
        self.routing = GradientRouting(
            model,
            routes,
            train_base=args.train_base,
            base_adapters=args.base_adapters,
            edges=args.edges,  # type: ignore[arg-type]
            layers=args.route_layers,
            joint=args.joint,
            gather=args.gather and not args.torch_compile,
        )
        check_kept_regions(args.kept_regions, self.routing.regions)
        self._refuse_sharded_norms()
        self._checked = not args.self_check
        self._labels_checked = not args.check_labels_after
        self.tokens_per_route: Counter[str] = Counter()  # over the run and all processes
        self._taught: Counter[tuple[str, str]] = Counter()  # since the last optimizer step, in this process

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a model as `Trainer` does; from the second on, as in a search, the routing goes over to it."""
        attached: GradientRouting | None = getattr(self, "routing", None)
        if attached is None:
            return super().call_model_init(trial)
        attached.detach()
        model = super().call_model_init(trial)
        self._route(model, attached.routes)
        return model

    @property
    def _clips_by_group(self) -> bool:
        return clips_by_group(self.routing.routes, self.routing.groups, wanted=self.args.clip_per_group)

    def _refuse_unsupported(self) -> None:
        args = self.args
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process means DataParallel, which cannot be routed: start one "
                "process per GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one")  # fmt: skip
        if args.use_liger_kernel:
            raise ValueError("`use_liger_kernel` reads weights outside their modules, past the routing: set it to "
                             "False")  # fmt: skip
        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(f"`hub_strategy={HubStrategy(args.hub_strategy).value!r}` would push checkpoints with "
                             "their regions and optimizer to the repository of the base: set it to 'every_save' or "
                             "'end', which push the base alone")  # fmt: skip
        if getattr(self, "aux_loss_enabled", False):  # TRL's, for mixtures of experts
            raise ValueError("TRL adds the routers' load-balancing loss, which depends on all rows of a batch, so forget "
                             "rows would train the base: set `router_aux_loss_coef=0.0`")  # fmt: skip
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed keeps gradients where idle groups cannot be dropped: use DDP or FSDP2")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1 and not plugin.use_orig_params:
            raise ValueError("FSDP1 flattens parameters of different groups together: set `use_orig_params` or use "
                             "FSDP2")  # fmt: skip

    def _refuse_sharded_norms(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 1 and self._clips_by_group and self.args.max_grad_norm > 0:
            raise ValueError("FSDP1 hides the norms of single groups, so base and regions cannot be clipped separately: use "
                             "FSDP2, or set `clip_per_group=False` or `max_grad_norm=0`")  # fmt: skip

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in ALL_COLUMNS if name not in columns)]  # type: ignore[assignment]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer as `Trainer` does, then split its groups by routing group."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            groups = {p: group for group in self.routing.groups for p in self.routing.parameters(group)}
            rate, decay = self.args.region_learning_rate, self.args.region_weight_decay
            if rate is None and self.schedule is not None:
                rate = self.schedule.rate * self.args.learning_rate
            tag_groups(optimizer, groups, region_learning_rate=rate, region_weight_decay=decay)
        elif not all("route" in group for group in optimizer.param_groups):
            raise ValueError('`optimizers`: every parameter group needs a "route" key; see '
                             "routed_peft.training.tag_groups")  # fmt: skip
        inner = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper where a run is continued
        if self._watched is not inner and hasattr(inner, "register_step_pre_hook"):
            # callbacks come between backward pass and step, and merging changes the size of a trained weight
            inner.register_step_pre_hook(lambda *_: self.routing.check_adapters())
            self._watched = inner
        self.optimizer = optimizer
        return optimizer

    # Steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Do one forward and backward pass under the routes of the batch."""
        labels, weights, environments = _pop_routes(inputs)
        if labels is None:
            raise ValueError("a training batch came without `route_label` or `route_labels`: is the column in the dataset, "
                "and does the collator keep it? (`packing=True` drops it; `routed_peft.data.pack` does not)")  # fmt: skip
        if not self._loader_checked:
            self._check_loader()
        if not self._checked and self._can_check(inputs):
            self._checked = True
            self._check_routing(model, inputs)
        if self.labels_in_rows and not isinstance(self.data_collator, RoutedCollator):
            check_batch(inputs, self.processing_class)
        labels = self._draw(model, labels, inputs)
        taught = self._count(labels, weights, inputs)
        if self.observer is not None:
            self.observer.observe(inputs, environments)
        with self.routing(labels, weights):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if taught:  # without a token that has a loss some losses are NaN, and their gradients zero
            check_finite(loss, self.state.global_step)
        return loss

    def _can_check(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether every process has a token with a loss, for the check reduces gradients over them."""
        seen = self._has_loss(inputs).any().reshape(1).to(self.args.device)
        return bool(self.accelerator.gather(seen).all())

    def _check_routing(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        prepared = self._prepare_inputs(dict(inputs))
        items = self._get_num_items_in_batch([prepared], self.args.device)

        def loss(_: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(batch), num_items_in_batch=items)

        model.train()
        penalty, self.args.activation_l1 = self.args.activation_l1, 0.0  # its gradient is not routed
        try:
            self.routing.self_check(prepared, loss)
        finally:
            self.args.activation_l1 = penalty

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as `Trainer` does, plus the activation penalty if `activation_l1` is set."""
        if not self.args.activation_l1 or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with activation_l1(self.model) as norms:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        scaled = kwargs.get("num_items_in_batch") is not None  # then Trainer does not divide by the accumulation steps
        penalty = self.args.activation_l1 * torch.stack(norms).sum()
        penalty = penalty / self.current_gradient_accumulation_steps if scaled else penalty
        return (result[0] + penalty, *result[1:]) if isinstance(result, tuple) else result + penalty

    def _count(self, labels: Tensor, weights: Mapping[str, Tensor] | None, inputs: Mapping[str, Any]) -> bool:
        """Count what the batch teaches, by group and label; return whether any token has a loss."""
        has_loss = self._has_loss(inputs).cpu()
        reached = has_loss.flip(1).cummax(1).values.flip(1)
        for group, count in self.routing.count_learning_positions(labels, reached, weights).items():
            self._taught["group", group] += count
        per_position = labels.cpu() if labels.dim() == 2 else labels.cpu().unsqueeze(1).expand_as(has_loss)
        for index, label in enumerate(self.routing.routes):
            self._taught["label", label] += int((has_loss & (per_position == index)).sum())
        return bool(has_loss.any())

    def _has_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return a bool ``(B, T)``: the positions from which a token with a loss is predicted."""
        return torch.nn.functional.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))  # position i predicts token i + 1

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._clips_by_group:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients(self.optimizer)
        return clip_by_group(self.optimizer, self.args.max_grad_norm)

    def _drop_idle_gradients(self) -> None:
        """Drop gradients of groups that no process has trained since the last step; count tokens over all processes."""
        groups, labels = self.routing.groups, list(self.routing.routes)
        keys = [("group", group) for group in groups] + [("label", label) for label in labels]
        counts = torch.tensor([self._taught[key] for key in keys], device=self.args.device)
        self._taught.clear()
        taught = self.accelerator.reduce(counts, "sum").tolist()
        self.tokens_per_route.update(dict(zip(labels, taught[len(groups) :], strict=True)))
        self._check_under_way()
        if any(taught):  # without any loss, no route has kept data from a group: as `Trainer` does
            idle = {group for group, count in zip(groups, taught, strict=False) if not count}
            drop_idle_gradients(self.optimizer, idle)

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does, then again with all regions ablated (``eval_ablated_…``).

        Callbacks get one ``on_evaluate``, after the second pass, with the metrics of both.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.args.evaluate_ablated or isinstance(datasets, dict):  # a dict comes back here one by one
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        first, *rest = metric_key_prefix.split("_", 1)  # "eval_forget" -> "eval_ablated_forget"
        prefix = "_".join([first, "ablated", *rest])
        with single_on_evaluate(self.callback_handler):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            with ablated(self.model, *self.routing.regions):
                metrics |= super().evaluate(eval_dataset, ignore_keys, prefix)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate one batch without its route columns."""
        _pop_routes(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)


def _pop_routes(inputs: dict[str, Any]) -> tuple[Tensor | None, Mapping[str, Tensor] | None, Any]:
    example, token, *others = (inputs.pop(name, None) for name in ROUTE_COLUMNS)
    return (example if token is None else token), *others
