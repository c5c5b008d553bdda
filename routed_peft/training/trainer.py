"""`RoutedTrainer`: a `transformers.Trainer` that routes gradients by the label of each row or token."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from routed_peft.data import RoutedCollator, class_names
from routed_peft.routes import Routes
from routed_peft.runs.cost import TrainingCost, matmul_parameters
from routed_peft.training.arguments import RoutedTrainingArguments
from routed_peft.training.changing_dataset import ChangingDataset
from routed_peft.training.mixin import RoutingMixin
from routed_peft.training.region_schedule import RegionSchedule


class RoutedTrainer(RoutingMixin, Trainer):
    """A `transformers.Trainer` that routes gradients by the label of each row or token.

    Rows carry ``input_ids`` and ``route_label`` (or ``route_labels``, one per token). Beyond `Trainer`: the first batch is
    tried under every label (`GradientRouting.self_check`); groups that no data trains in a step do not move; evaluation runs
    twice, with regions on and ablated, and its losses are means over tokens, in nats; checkpoints have the layout of
    `save_routed`. Everything else works as in `Trainer`: accumulation, clipping, DDP and FSDP2, bf16 autocast, resuming.

    Args:
        model: a model with adapters; see `GradientRouting`. None where ``model_init`` makes one.
        args: `RoutedTrainingArguments`.
        routes: label -> `Route`; or a `RegionSchedule`, which makes regions that work when they are on.
        data_collator: a `RoutedCollator` for ``processing_class`` by default. Any other makes batches of rows without
            their route columns, and the trainer adds the labels.
        **kwargs: as for `Trainer`.

    Raises:
        ValueError: where routing cannot be attached, or the data does not fit the routes.
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: RoutedTrainingArguments,
        *,
        routes: Routes | RegionSchedule,
        data_collator: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            if processing_class is None:
                raise ValueError("`RoutedTrainer` needs `processing_class` (the tokenizer) or a `data_collator`")
            dataset = kwargs.get("train_dataset")
            table, names = RegionSchedule.routes_of(routes), class_names(dataset)
            data_collator = RoutedCollator(processing_class, table, class_names=names)
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        self._attach(routes)

    def run_summary(self, labeled_forget_tokens: int = 0) -> dict[str, Any]:
        """Return the results of a run that has ended; call it in all processes, because it evaluates if the last step did not.

        They are ``steps``; ``tokens`` where ``include_num_input_tokens_seen`` is on; ``tokens_per_route`` by label;
        ``seconds``, of the last session where the run was resumed; ``losses``, in nats per token, by evaluation set,
        ``ablated_…`` without regions; and where tokens are counted the ``ledger`` of `routed_peft.runs.cost.TrainingCost`,
        without evaluation, but with ``labeled_forget_tokens``: distinct tokens of forget text that had to be labeled.
        """
        history, step = self.state.log_history, self.state.global_step
        done = [entry for entry in history if entry["step"] == step and any(key.startswith("eval_") for key in entry)]
        if self.eval_dataset and not done:
            done = [self.evaluate()]
        tokens = int(self.state.num_input_tokens_seen)
        summary = {
            "steps": step,
            "tokens": tokens,
            "tokens_per_route": dict(self.tokens_per_route),
            "seconds": next((entry["train_runtime"] for entry in history[::-1] if "train_runtime" in entry), None),
            "losses": {
                key[len("eval_") : -len("_loss")]: loss
                for entry in done
                for key, loss in entry.items()
                if key.endswith("_loss")
            },
        }
        if tokens:
            rows, silenced = self.train_dataset, self.consistency_tokens * self.args.world_size
            summary["ledger"] = TrainingCost.from_counts(
                matmul_parameters(self.accelerator.unwrap_model(self.model)),
                tokens + silenced,
                steps=step,
                labeled_forget_tokens=labeled_forget_tokens,
                teacher_tokens=silenced + (rows.forward_tokens if isinstance(rows, ChangingDataset) else 0),
            ).to_dict()
        return summary
