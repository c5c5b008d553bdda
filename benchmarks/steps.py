"""Models and training steps that `step_time.py` compares: routed, unrouted, and alternatives without this library."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from routed_peft import GradientRouting, Route, RoutedConfig

ROWS = 10  # so that every tenth of a batch is a number of rows
Step = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """A Llama, the hidden units of each of its regions, and the positions per row."""

    hidden: int
    layers: int
    vocabulary: int
    units: int
    length: int
    regions: int = 1
    pairs: int = 1  # of steps for each repeat: the shorter a step, the noisier

    def model(self, device: str) -> nn.Module:
        """Build the model with its regions, everything trainable, nothing routed."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=max(2, self.hidden // 64),
            num_key_value_heads=max(2, self.hidden // 64), max_position_embeddings=self.length,
        )  # fmt: skip
        region = RoutedConfig(size=self.units, init="model", task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), region, adapter_name="r0")
        for index in range(1, self.regions):
            model.add_adapter(f"r{index}", replace(region))
        model.base_model.set_adapter([f"r{index}" for index in range(self.regions)])
        return model.requires_grad_(True).train().to(device)

    def batch(self, device: str) -> dict[str, Tensor]:
        """Return random tokens."""
        ids = torch.randint(0, self.vocabulary, (ROWS, self.length), generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids.to(device), "labels": ids.to(device)}


SIZES = {
    "tiny": Size(hidden=32, layers=1, vocabulary=64, units=8, length=8),
    "small": Size(hidden=128, layers=4, vocabulary=2048, units=64, length=128, pairs=4),
    "medium": Size(hidden=256, layers=4, vocabulary=2048, units=64, length=128, pairs=2),
    "large": Size(hidden=512, layers=4, vocabulary=2048, units=64, length=128),
}

ROUTES = {"forget": Route(weights={"base": 0.0}), "retain": Route(ablated=("r0",)), "unlabeled": Route()}
FORGET, RETAIN, UNLABELED = range(3)


def row_labels(zero: float, rest: int = UNLABELED) -> Tensor:
    """Label the share ``zero`` of the rows `forget`, spread over the batch, and the others ``rest``."""
    count = round(zero * ROWS)
    return torch.tensor([FORGET if (i * 7) % ROWS < count else rest for i in range(ROWS)])


def token_labels(zero: float, length: int) -> Tensor:
    """Label the share ``zero`` of the positions `forget`, at random, and the others `unlabeled`."""
    order = torch.randperm(ROWS * length, generator=torch.Generator().manual_seed(2))
    return torch.where(order < zero * len(order), FORGET, UNLABELED).reshape(ROWS, length)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make Trainer's default optimizer, at a rate that leaves the weights where they are."""
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Forward, backward, AdamW."""
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def routed_step(
    routing: GradientRouting,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    labels: Tensor,
) -> None:
    """Run the same step, under ``labels``."""
    with routing(labels):
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Alternatives that users have today. None of them routes embeddings or norms, which flatters them a little.


def _detach_mask(module: nn.Linear, m: Tensor, x: Tensor) -> Tensor:
    y = F.linear(x, module.weight)
    return m * y + (1 - m) * y.detach()


def _two_matmuls(module: nn.Linear, m: Tensor, x: Tensor) -> Tensor:
    return m * F.linear(x, module.weight) + (1 - m) * F.linear(x, module.weight.detach())


def base_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers outside regions."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "routed_" not in name]


def _with_forward(forward: Callable[..., Tensor], model: nn.Module, labels: Tensor) -> nn.Module:
    m = (labels != FORGET).float().reshape(-1, 1, 1).to(next(model.parameters()).device)
    for module in base_linears(model):
        module.forward = partial(forward, module, m)  # type: ignore[method-assign]
    return model


def _by_label(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], labels: Tensor, split: bool
) -> None:
    """Backward once per label, the base frozen for `forget`: over its rows (``split``), or over all with the loss masked."""
    base = [p for name, p in model.named_parameters() if "routed_" not in name]
    for label in labels.unique().tolist():
        mine = (labels == label).to(batch["labels"].device)
        part = {k: v[mine] for k, v in batch.items()}
        if not split:
            part = {**batch, "labels": batch["labels"].masked_fill(~mine.unsqueeze(1), -100)}
        for p in base:
            p.requires_grad_(label != FORGET)
        (model(**part).loss * (mine.sum() / len(labels))).backward()
    optimizer.step()
    optimizer.zero_grad()


def todays_steps(size: Size, device: str, labels: Tensor) -> dict[str, Step]:
    """Return, by name, the steps that need nothing of this library."""
    batch = size.batch(device)
    steps: dict[str, Step] = {}
    for name, forward in {"detach mask on activations": _detach_mask, "two matmuls, exact": _two_matmuls}.items():
        model = _with_forward(forward, size.model(device), labels)
        steps[name] = partial(plain_step, model, make_optimizer(model), batch)
    for name, split in {"two passes": False, "one label per micro-batch": True}.items():
        model = size.model(device)
        steps[name] = partial(_by_label, model, make_optimizer(model), batch, labels, split)
    return steps


# Measuring


def seconds(step: Step, device: str) -> float:
    """Time one step: by the processor time of one thread (other programs may run beside it), or by CUDA's clock."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def compare(plain: Step, others: dict[str, Step], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Time each of ``others`` right beside ``plain``, by turns first and second; ratios are medians over pairs."""
    for step in (plain, *others.values()):
        step()
    ratios: dict[str, list[float]] = {name: [] for name in others}
    times: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(repeats):
        for name, step in others.items():
            pair = {True: 0.0, False: 0.0}
            for is_plain in (turn % 2 == 0, turn % 2 == 1):
                pair[is_plain] = seconds(plain if is_plain else step, device)
            ratios[name].append(pair[False] / pair[True])
            times[name].append(pair[False])
    return {name: {"ratio": statistics.median(ratios[name]), **_spread(ratios[name], times[name])} for name in others}


def _spread(ratios: Sequence[float], times: Sequence[float]) -> dict[str, float]:
    lower, _, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"lower_quartile": lower, "upper_quartile": upper, "seconds": statistics.median(times)}


def peak_bytes(step: Step, optimizer: torch.optim.Optimizer, device: str) -> int:
    """Return the peak of allocated memory over a step: what the step allocates, and weights and Adam's state."""
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    kept = [p for group in optimizer.param_groups for p in group["params"]]
    kept += [t for state in optimizer.state.values() for t in state.values()]
    return peak + sum(t.nbytes for t in kept)
