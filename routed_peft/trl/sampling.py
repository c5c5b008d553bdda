"""Sampling and scoring of rollouts: prompts in order, anchors without regions, references without any adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from routed_peft.ablation import ablated
from routed_peft.data.columns import column_values
from routed_peft.trl.config import RoutedGRPOConfig
from routed_peft.trl.mixin import TRLMixin, folded_parameters
from routed_peft.trl.rollout_labels import EnvironmentLabels, ImperfectDetector
from routed_peft.trl.rollouts import ANCHOR


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch alone, so that a resumed run sees the prompts of a whole one.

    TRL's draws one permutation after another from its own generator. `Trainer` calls `set_epoch` before every epoch.

    >>> whole, resumed = (EpochSampler(range(8), 1, seed=0) for _ in range(2))
    >>> epochs = [list(whole) for whole.epoch in range(3)]
    >>> resumed.set_epoch(2)
    >>> list(resumed) == epochs[2] and epochs[2] != epochs[0]
    True
    """

    epoch = 0

    @classmethod
    def from_sampler(cls, sampler: RepeatSampler) -> EpochSampler:
        """Return an `EpochSampler` with the arguments of ``sampler``."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(*(getattr(sampler, name) for name in names))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            assert self.seed is not None, "TRL gives that of the arguments"
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        return super().__iter__()


def anchor_groups(
    environments: Sequence[str | None], share: float, *, trusted: Collection[str] | None, seed: Sequence[int]
) -> np.ndarray:
    """Draw the groups whose rollouts are sampled with the regions ablated: bool, one per group.

    ``environments`` are those of each group of a generation batch, over all processes. ``share`` is of all groups; a fraction
    of a group is rounded up or down at random. Fewer are drawn where fewer are ``trusted`` (None: all).

    >>> anchor_groups(["A", "B", "A", "B"], 0.5, trusted=["A"], seed=[0]).tolist()
    [True, False, True, False]
    """
    rng = np.random.default_rng(seed)
    wanted = int(len(environments) * share + rng.random())
    eligible = np.array([trusted is None or environment in trusted for environment in environments], dtype=bool)
    chosen = rng.permutation(np.flatnonzero(eligible))[:wanted]
    return np.isin(np.arange(len(environments)), chosen)


class OriginalModel:
    """Placeholder for the trained model with all its adapters off, where TRL expects a reference model."""


def active_dropout(model: nn.Module) -> str | None:
    """Return the name of a dropout module or dropout rate that is active in training, or None.

    >>> active_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))), active_dropout(nn.Dropout(0.0))
    ('1', None)
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            return name
        rates = (key for key, value in vars(module).items() if "drop" in key and isinstance(value, float) and value)
        if rate := next(rates, None):
            return f"{name}.{rate}"
    return None


class SamplingMixin(TRLMixin, GRPOTrainer):
    """Generation and scoring in `RoutedGRPOTrainer`, which take no gradients."""

    args: RoutedGRPOConfig  # type: ignore[assignment]
    num_generations: int
    label_fn: Any
    _logs: dict[str, Any]
    _in_engine: list[str]  # regions whose weights vLLM has
    _anchor: Any = None  # bool (B,), while a generation batch is made

    # Anchors

    def _draw_anchors(self, rows: list[dict[str, Any]]) -> Tensor:
        """Return a bool ``(B,)`` of this process's rows; whole groups, drawn over all processes."""
        args, size = self.args, self.num_generations
        if not args.anchor_share or not self.model.training:
            return torch.zeros(len(rows), dtype=torch.bool)
        groups, seed = self._gather(self._environments(rows))[::size], [args.seed, *self._moment()]
        chosen = anchor_groups(groups, args.anchor_share, trusted=args.anchor_environments, seed=seed)
        return self._own_rows(torch.from_numpy(chosen).repeat_interleave(size), len(rows))

    def _own_rows(self, values: Tensor, count: int) -> Tensor:
        return values[self.accelerator.process_index * count :][:count]

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler.from_sampler(super()._get_train_sampler(dataset))  # type: ignore[arg-type]

    def _with_class_names(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows with the name of their environment, where the dataset holds ClassLabel integers."""
        column = self.args.environment_column
        feature = (getattr(self.train_dataset, "features", None) or {}).get(column)
        if not isinstance(feature, ClassLabel):
            return rows
        return [row if row.get(column) is None else {**row, column: feature.names[row[column]]} for row in rows]

    def _environments(self, rows: list[dict[str, Any]]) -> list[str | None]:
        column = self.args.environment_column
        environments = [row.get(column) for row in self._with_class_names(rows)]
        if self.args.anchor_environments is not None and None in environments:
            raise ValueError(f"`anchor_environments` needs the column `{column}` in every row, got {sorted(rows[0])}")
        return environments

    def _check_environments(self) -> None:
        """Refuse environments that are named and do not occur; a streaming dataset cannot tell."""
        named = {"anchor_environments": (self.args.anchor_environments, self.args.environment_column)}
        label_fn = self.label_fn
        while isinstance(label_fn, ImperfectDetector):
            label_fn = label_fn.detector
        if isinstance(label_fn, EnvironmentLabels):
            named["label_fn"] = (list(label_fn.labels), label_fn.column)
        ds: Any = self.train_dataset
        for argument, (names, column) in named.items():
            if names is None or not isinstance(ds, Dataset):
                continue
            if column not in ds.column_names:
                raise ValueError(f"`{argument}` needs the column `{column}`, got the columns {ds.column_names}")
            known = sorted(set(column_values(ds, column)), key=str)
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"`{argument}` has {unknown}, which `{column}` does not hold: it holds {known}")

    def _moment(self) -> tuple[int, int]:
        """Return (optimizer step, micro-batch within it): the same after resuming."""
        return self.state.global_step, self._step % self.args.gradient_accumulation_steps

    def _gather(self, values: list[Any]) -> list[Any]:
        """Return ``values`` of all processes, in TRL's global order."""
        return values if self.accelerator.num_processes == 1 else gather_object(values)

    # Generating

    def _ablated_rows(self, anchor: Tensor) -> AbstractContextManager[None]:
        return self.routing.ablated(dict.fromkeys(self.routing.regions, anchor))

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self._anchor is None or not self._anchor.any():
            self._load_regions([] if self._evaluates_ablated else self.routing.regions)
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.use_vllm:
            return self._generate_in_turns(prompt_ids, self._anchor, *args, **kwargs)
        assert len(prompt_ids) == len(self._anchor), "tools are refused with anchors, and nothing else takes turns"
        with self._ablated_rows(self._anchor):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    # vLLM holds one configuration at a time

    def _attach_engine(self) -> None:
        """Have the engine take weights with the adapters folded in, in place of TRL's merging and unmerging."""
        if self.use_vllm:
            self._in_engine = list(self.routing.regions)
            kept, engine = self.args.base_adapters, cast(Any, self.vllm_generation)
            engine._iter_named_params = lambda: folded_parameters(self.model, [*kept, *self._in_engine])

    def _load_regions(self, regions: Sequence[str]) -> None:
        if self.use_vllm and self._in_engine != list(regions):
            self._in_engine = list(regions)
            self._last_loaded_step = -1  # has TRL send the weights again

    def _generate_in_turns(self, prompt_ids: list[list[int]], anchor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Generate with the regions in the engine's weights and without, each for its own prompts, whole groups at a time."""
        made: list[Any] = [None] * len(prompt_ids)  # of each: a completion, and its log-probabilities
        for regions, rows in ((self.routing.regions, ~anchor), ([], anchor)):
            if not rows.any():
                continue
            self._load_regions(regions)
            chosen = rows.nonzero()[:, 0].tolist()
            found = super()._generate_single_turn([prompt_ids[row] for row in chosen], *args, **kwargs)
            for row, completion, score in zip(chosen, *found, strict=True):
                made[row] = completion, score
        return tuple(list(part) for part in zip(*made, strict=True))

    # Scoring

    def _check_dropout(self) -> None:
        """Refuse dropout where completions are scored a second time, for the importance ratio."""
        args, routes = self.args, self.routing.routes.items()
        reused = args.gradient_accumulation_steps % ((args.steps_per_generation or 1) * args.num_iterations)
        corrected = args.use_vllm and args.vllm_importance_sampling_correction
        causes = {"`anchor_share`": args.anchor_share, "`num_iterations` or `steps_per_generation`": reused}
        causes |= {"`vllm_importance_sampling_correction`": corrected}
        causes |= {f"the route {label!r}": bool(route.ablated) for label, route in routes if label != ANCHOR}
        if cause := next((cause for cause, holds in causes.items() if holds), None):
            self._check_no_dropout(cause)

    def _check_no_dropout(self, cause: str) -> None:
        if found := active_dropout(self.model):
            raise ValueError(f"{cause} has rollouts scored twice for the importance ratio, and {found!r} drops out "
                "different things each time, so the ratio would be noise: set `lora_dropout` to 0, or "
                "`disable_dropout=True`, or load the model without its dropout (such as `attention_dropout=0.0`)")  # fmt: skip

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Score completions as TRL does: the reference without adapters, sampled rows as they were sampled."""
        score = super()._get_per_token_logps_and_entropies
        if isinstance(model, OriginalModel):
            with ablated(self.model, *self.routing.regions, *self.args.base_adapters):
                return score(self.model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        anchor = self._anchor
        if model is not self.model or anchor is None or not anchor.any():
            return score(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)
        parts = []
        count = len(input_ids)
        for rows in torch.arange(count).split(batch_size or count):  # TRL's chunks, each with its gates
            with self._ablated_rows(anchor[rows]):
                parts.append(score(model, input_ids[rows], attention_mask[rows], logits_to_keep, **kwargs)[0])
        return torch.cat(parts), None, None

    def _sampled_logps(self, batch: dict[str, Any]) -> Tensor:
        """Return ``(B, C)`` log-probabilities of the completions under the configuration that sampled them."""
        names = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
                 "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")  # fmt: skip
        more = {name: batch[name] for name in names if batch.get(name) is not None}
        ids, mask = (
            torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask")
        )
        length, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, length, size, **more)[0]
