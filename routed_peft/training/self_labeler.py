"""The Trainer callback that scores and relabels `SelfLabeledRows`."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from routed_peft.training.benefit import benefit_threshold, find_region, middle_and_spread, score_rows

REFERENCE_ROWS = 256
"""Labeled rows of each side that are scored to set the threshold, at most."""


class SelfLabeler(TrainerCallback):
    """Scores and relabels ``rows``, which are `SelfLabeledRows`, after the labeled start of a run."""

    def __init__(self, trainer: Any, rows: Any) -> None:
        self.trainer, self.rows = trainer, rows

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Reset labels found in an earlier run of the same rows; check the run's length and the times of scoring."""
        if state.global_step == 0:
            self.rows.restore({})
        wanted = self._start(args, state.max_steps - 1)
        if len(self.rows) != wanted:
            raise ValueError(f"the rows are laid out for a run of {len(self.rows)} and it takes {wanted}, {state.max_steps} "
                             f"steps of {self._start(args, 0)}: make `SelfLabeledRows` with `count={wanted}`, or set "
                             "`max_steps`")  # fmt: skip
        steps = self._steps(state)
        last = max(steps)
        if len(steps) < len(self.rows.score_at) or self._start(args, last) >= len(self.rows):
            raise ValueError(f"`{steps[last]}`: after step {last} of {state.max_steps} there is nothing left to label: "
                             "score earlier, or train for longer")  # fmt: skip

    def _steps(self, state: TrainerState) -> dict[int, str]:
        """Return the steps after which rows are scored, with the setting that asks for each."""
        return {max(1, round(share * state.max_steps)): name for name, share in self.rows.score_at.items()}

    @staticmethod
    def _start(args: TrainingArguments, step: int) -> int:
        """Return the first row of the run that a scoring after this step changes."""
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return (step + 1) * per_step  # a loader may have fetched the next batch already

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Score rows after the labeled start, and a second time where `score_again_at` asks for it."""
        name = self._steps(state).get(state.global_step)
        if name is None:
            return
        rows, start = self.rows, self._start(args, state.global_step)
        scored, size = rows.rows_to_score(len(rows) - start), args.eval_batch_size
        known = [rows.rows_labeled(label, REFERENCE_ROWS) for label in rows.kinds]
        indices, alone = np.concatenate([*known, scored]), [[region] for region in rows.regions] or None
        score = partial(score_rows, batch_size=size, separator=rows.separator, subsets=alone)
        benefits = iter(score(self.trainer, rows.rows, indices=indices))
        *sides, core = (torch.cat(list(islice(benefits, len(own)))) for own in known)
        moment = f"`{name}`: after {state.global_step} steps"
        thresholds = [self._threshold(side[:, i], core[:, i], index=i, moment=moment) for i, side in enumerate(sides)]
        found = [find_region(own, thresholds).tolist() for own in benefits]  # of the rows that are left
        by_document = [[rows.kinds[i] if rows.regions else i == 0 for i in own] for own in found]
        flat = [kind for own in by_document for kind in own]
        tokens = sum(len(ids) for ids in rows.rows.select(indices)["input_ids"])
        labels = {"labels" if rows.regions else "is_forget": flat if rows.separator is None else by_document}
        result = {"rows": scored.tolist(), **labels, "tokens": tokens}
        rows.apply_scoring({"step": state.global_step, "start": start} | result)
        count = Counter(i for own in found for i in own)
        self.trainer.log({f"self_labels_{kind}": count[i] for i, kind in enumerate(rows.kinds)})

    def _threshold(self, own: Tensor, core: Tensor, *, index: int, moment: str) -> float:
        """Return the threshold between a region's benefits to its rows and others; refuse one that cannot tell them apart."""
        kind, names = self.rows.config.threshold, self.rows.kinds
        (mu_f, _), (mu_r, _) = (middle_and_spread(side, kind) for side in (own, core))
        if not mu_f > mu_r:  # also where the model has diverged
            raise ValueError(f"{moment} the region helps labeled {names[index]} rows by {mu_f:.3f} nats per token and "
                f"{names[-1]} rows by {mu_r:.3f}, so it cannot tell them apart: give it a longer start, or check the "
                "labels")  # fmt: skip
        return benefit_threshold(own, core, kind)
