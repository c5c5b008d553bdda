"""`RoutedSFTTrainer`: TRL's supervised fine-tuning with gradients routed by the label of each row."""

from __future__ import annotations

import copy
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import ProcessorMixin
from trl import SFTTrainer

from routed_peft.data import RoutedCollator, class_names
from routed_peft.data.columns import ROUTE_COLUMNS
from routed_peft.routes import Routes
from routed_peft.training.region_schedule import RegionSchedule
from routed_peft.trl.config import RoutedSFTConfig
from routed_peft.trl.mixin import TRLMixin, check_arguments, with_adapters


class RoutedSFTTrainer(TRLMixin, SFTTrainer):
    """`trl.SFTTrainer` that routes gradients by the label of each row or token; everything else as in TRL.

    The column ``route_label`` (or ``route_labels``, one per token of rows that have ``input_ids`` already) passes through
    TRL's processing: chat templates, prompt-completion rows, completion-only loss, truncation.

    Beyond TRL: what `RoutedTrainer` does beyond `Trainer`. The head, and embeddings tied to it, stay frozen.

    Args:
        model: a PeftModel; or a model, path or Hub id together with ``peft_config``.
        data_collator: a `RoutedCollator` that pads on the right, as TRL does, by default. Any other makes batches of rows
            without their route columns, and the trainer adds the labels.
        train_dataset: in any format that TRL takes, with ``route_label``.
        peft_config: ``{adapter name: config}``.
        **kwargs: as for `trl.SFTTrainer`.

    Raises:
        ValueError: where routing cannot be attached, the data does not fit the routes, and on packing, padding-free
            batches, images and Liger.
    """

    def __init__(
        self,
        model: Any,
        args: RoutedSFTConfig,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *,
        routes: Routes | RegionSchedule,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, RoutedSFTConfig):
            raise ValueError(f"`args` is a `RoutedSFTConfig`, got {type(args).__name__}")
        if args.packing or args.eval_packing or args.padding_free:
            raise ValueError("`packing`, `eval_packing` and `padding_free` put documents of different labels into one "
                             "row, and TRL drops their labels: set all three to False. (`routed_peft.data.pack` packs "
                             "documents of one label; give its rows to `RoutedTrainer`.)")  # fmt: skip
        quantization_config = kwargs.pop("quantization_config", None)
        model = with_adapters(model, peft_config, args=args, quantization_config=quantization_config)
        check_arguments(args, model)
        self._class_names = class_names(train_dataset)  # a stream that TRL has processed does not know them
        super().__init__(model, args, data_collator, train_dataset, **kwargs)
        if self._is_vision_dataset:
            raise ValueError("rows with images cannot be routed here: TRL's vision collator drops the route columns")
        if data_collator is None:
            own: Any = self.processing_class
            tokenizer = copy.copy(own.tokenizer if isinstance(own, ProcessorMixin) else own)
            tokenizer.padding_side = "right"  # as TRL's own collator pads
            names, multiple = self._class_names, cast(Any, args.pad_to_multiple_of)
            self.data_collator = RoutedCollator(
                tokenizer, RegionSchedule.routes_of(routes), pad_to_multiple_of=multiple, class_names=names
            )
        self._attach(routes)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as TRL does; route columns are no arguments of the model."""
        inputs = {name: value for name, value in inputs.items() if name not in ROUTE_COLUMNS}
        return super().compute_loss(model, inputs, *args, **kwargs)
