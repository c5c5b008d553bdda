"""A schedule of regions within a Trainer: the labels it draws, and the pass in which regions learn to be silent elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerState

from routed_peft.eval_mode import evaluating
from routed_peft.routes import IGNORED, Routes
from routed_peft.routing.gradient_routing import GradientRouting
from routed_peft.training.finite_weights import Host
from routed_peft.training.region_schedule import ConsistencyRows, RegionSchedule


class ScheduleMixin(Host):
    """Carries a `RegionSchedule` out, if the trainer has one."""

    routing: GradientRouting
    schedule: RegionSchedule | None = None
    consistency_tokens = 0
    """Tokens of consistency passes so far, in this process and session."""
    _micro_batch = (-1, 0)  # the step, and the number of its micro-batches so far
    _divergence: list[float]
    _taught: Counter[tuple[str, str]]

    def _take_schedule(self, routes: Routes | RegionSchedule) -> Routes:
        """Return the routes, of a schedule where there is one, which is remembered; ValueError where it cannot work."""
        if not isinstance(routes, RegionSchedule):
            return routes
        args: Any = self.args
        if routes.consistency and (args.joint or args.edges != "parameters"):
            raise ValueError("a consistency pass must teach regions alone, but `joint` modules and, with activation edges, "
                "part of the base learn from everything: leave `joint` and `edges` out, or set `consistency=0`")  # fmt: skip
        self.schedule = routes
        return routes.routes()

    def _draw(self, model: nn.Module, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Do the consistency pass that is due, if any, and return the labels under which the batch is trained."""
        if self.schedule is None:
            return labels
        state: TrainerState = self.state
        step, count = state.global_step, self._micro_batch[1] if self._micro_batch[0] == state.global_step else 0
        self._micro_batch = (step, count + 1)
        moment = (count, self.args.process_index)
        if (step * self.args.gradient_accumulation_steps + count) % self.schedule.consistency_every == 0:
            rows = self.schedule.draw_consistency(labels.cpu(), step=step, moment=moment)
            if rows is None and self.schedule.consistency and self.args.world_size > 1:
                rows = ConsistencyRows.none(
                    len(self.schedule.regions)
                )  # processes wait for each other in forward passes
            self._consistency_pass(model, inputs, rows)
        return self.schedule.draw(labels.cpu(), step=step, steps=state.max_steps, moment=moment)

    def _consistency_pass(self, model: nn.Module, inputs: Mapping[str, Any], drawn: ConsistencyRows | None) -> None:
        """Add the gradient of the consistency loss, which is reduced over processes together with that of the batch."""
        if drawn is None or self.schedule is None:
            return
        prepared = self._prepare_inputs(dict(inputs))
        index = drawn.rows.to(prepared["input_ids"].device)
        size = len(prepared["input_ids"])
        rows = {
            key: value[index] for key, value in prepared.items() if isinstance(value, Tensor) and len(value) == size
        }
        reached = rows.pop("labels")[:, 1:] != IGNORED
        names = self.schedule.regions
        with self.accelerator.no_sync(model), evaluating(model), self.compute_loss_context_manager():
            with self.routing.subset(drawn.present(names, target=True)), torch.no_grad():
                target = model(**rows).logits
            with self.routing.subset(drawn.present(names, target=False), drawn.weights(names)):
                loss = divergence(model(**rows).logits, target, reached)
                scaled = self.schedule.consistency * loss / self.current_gradient_accumulation_steps
                self.accelerator.backward(scaled)
        teaching = drawn.on & ~drawn.own
        for i, name in enumerate(names):
            self._taught["group", name] += int(reached[teaching[:, i].to(reached.device)].sum())
        self.consistency_tokens += rows["input_ids"].numel()
        if teaching.any():
            self._divergence = [*getattr(self, "_divergence", []), float(loss.detach())]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as `Trainer` does, with the mean divergence of consistency passes since the last time."""
        if "loss" in logs and getattr(self, "_divergence", None):
            logs = {**logs, "consistency": sum(self._divergence) / len(self._divergence)}
            self._divergence = []
        super().log(logs, *args, **kwargs)


def divergence(logits: Tensor, target: Tensor, reached: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(\text{target} \| \text{logits})` in nats, the mean over positions that predict a token.

    Args:
        logits: ``(K, T, V)``.
        target: ``(K, T, V)``, without gradient.
        reached: bool ``(K, T - 1)``, true where the next token has a loss.

    >>> logits = torch.zeros(1, 2, 2)
    >>> divergence(logits, logits, torch.tensor([[True]]))
    tensor(0.)
    """
    p, q = (F.log_softmax(x[:, :-1].float(), dim=-1) for x in (target, logits))
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return (each * reached).sum() / reached.sum().clamp(min=1)
