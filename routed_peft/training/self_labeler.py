"""Asking the region: when the start of a run is over, its benefit to rows or documents becomes their label."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from routed_peft.data.columns import ROUTE_LABEL
from routed_peft.data.labels import FORGET, RETAIN, UNLABELED
from routed_peft.data.regroup import document_means, document_of
from routed_peft.training.benefit import benefit_threshold, middle_and_spread, region_benefit, row_means
from routed_peft.training.self_labels import REFERENCE_ROWS, SelfLabeledRows

if TYPE_CHECKING:
    from routed_peft.training.mixin import RoutingMixin


NO_DOCUMENT = torch.inf
"""Stands where no document begins, so that every row has as many numbers."""


class SelfLabeler(TrainerCallback):
    """Scores and relabels `SelfLabeledRows` when their start is over."""

    def __init__(self, trainer: RoutingMixin, rows: SelfLabeledRows) -> None:
        self.trainer, self.rows = trainer, rows

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an earlier run with the same rows found; refuse another length, and scorings that would do nothing."""
        if state.global_step == 0:
            self.rows.restore([])
        wanted = state.max_steps * self._per_step(args)
        if len(self.rows) != wanted:
            raise ValueError(
                f"the rows are laid out for a run of {len(self.rows)} and it takes {wanted}, {state.max_steps} steps of "
                f"{self._per_step(args)}: make `SelfLabeledRows` with `count={wanted}`, or set `max_steps`"
            )
        steps = self._steps(state)
        last = max(steps)
        if len(steps) < len(self.rows.score_at) or self._start(args, last) >= len(self.rows):
            raise ValueError(
                f"`{steps[last]}`: after step {last} of {state.max_steps} there is nothing left to label: score earlier, or "
                "train for longer"
            )

    def _steps(self, state: TrainerState) -> dict[int, str]:
        """Return after which steps rows are scored, and the setting that says so."""
        return {max(1, round(share * state.max_steps)): name for name, share in self.rows.score_at.items()}

    @staticmethod
    def _per_step(args: TrainingArguments) -> int:
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _start(self, args: TrainingArguments, step: int) -> int:
        """Return the first row of the run that a scoring after this step changes."""
        return (step + 1) * self._per_step(args)  # a loader may have fetched the next batch already

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score rows once the start is over, and again where that is asked for."""
        name = self._steps(state).get(state.global_step)
        if name is None:
            return
        start = self._start(args, state.global_step)
        scored = self.rows.to_score(len(self.rows) - start)
        known = [self.rows.given(label, REFERENCE_ROWS) for label in (FORGET, RETAIN)]
        asked = np.concatenate([*known, scored])
        benefits = iter(self._benefit(asked, args.eval_batch_size))
        forget, retain = (torch.cat(list(islice(benefits, len(rows)))) for rows in known)
        (mu_f, _), (mu_r, _) = (middle_and_spread(side, self.rows.threshold) for side in (forget, retain))
        if not mu_f > mu_r:  # nor where the model has diverged
            raise ValueError(
                f"`{name}`: after {state.global_step} steps the region helps labelled forget rows by {mu_f:.3f} nats per token "
                f"and retain rows by {mu_r:.3f}, so it cannot tell them apart: give it a longer start, or check the labels"
            )
        threshold = benefit_threshold(forget, retain, self.rows.threshold)
        by_document = [(own > threshold).tolist() for own in benefits]  # of the rows that are left
        flat = [label for own in by_document for label in own]
        is_forget = by_document if self.rows.separator is not None else flat
        tokens = sum(len(ids) for ids in self.rows.rows.select(asked)["input_ids"])
        found = {"rows": scored.tolist(), "is_forget": is_forget, "tokens": tokens}
        self.rows.add({"step": state.global_step, "start": start} | found)
        self.trainer.log({"self_labels_forget": sum(flat), "self_labels_retain": len(flat) - sum(flat)})

    def _benefit(self, indices: np.ndarray, batch_size: int) -> list[Tensor]:
        """Return the benefits of each row: one, or with a ``separator`` that of each document.

        Processes share the work, each with equally many batches.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        each = -(-len(indices) // accelerator.num_processes)
        mine = np.resize(indices, each * accelerator.num_processes)[accelerator.process_index * each :][:each]
        with trainer.compute_loss_context_manager(), torch.no_grad():
            scores = [
                self._score(trainer.data_collator([self._row(i) for i in part]))
                for part in np.array_split(mine, -(-len(mine) // batch_size))
            ]
        found = accelerator.gather(torch.cat(scores).to(accelerator.device)).cpu()[: len(indices)]
        return [own[own != NO_DOCUMENT] for own in found]

    def _score(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the benefit of each row, ``(B, 1)``, or at the first token of each document, ``(B, T)``."""
        benefit = region_benefit(self.trainer.model, batch, self.trainer.routing.regions)
        if (separator := self.rows.separator) is None:
            return row_means(benefit, batch["labels"].to(benefit.device))[:, None]
        documents = document_of(batch["input_ids"].to(benefit.device), separator)
        begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
        return document_means(benefit, documents).masked_fill(~begins, NO_DOCUMENT)

    def _row(self, index: int) -> dict[str, Any]:
        return {**self.rows.rows[int(index)], ROUTE_LABEL: UNLABELED}
