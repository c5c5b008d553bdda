"""Labels of a routed Trainer: found by name whatever collator makes a batch, and checked, so that they route something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.utils import logging

from routed_peft.data import RoutedCollator, check_route_columns, class_names
from routed_peft.data.labeled_batches import LabeledBatches, labeled_batches
from routed_peft.data.padding import check_unpacked
from routed_peft.data.vocabulary import check_tokens, vocabulary
from routed_peft.routes import Route, Routes
from routed_peft.routing.gradient_routing import GradientRouting
from routed_peft.training.arguments import RoutedTrainingArguments
from routed_peft.training.finite_weights import Host

logger = logging.get_logger(__name__)


class LabeledLoadersMixin(Host):
    """Overrides of Trainer's loaders: the training loader labels its batches, and those of evaluation need no labels."""

    args: RoutedTrainingArguments
    routing: GradientRouting
    labels_in_rows = True
    """Whether labels are columns of the rows; otherwise the trainer labels batches itself."""
    _loader_checked = False
    _labels_checked: bool
    tokens_per_route: Counter[str]
    _class_names: list[str] | None = None  # of a dataset that the host has processed since

    def _label_names(self, dataset: Any) -> list[str] | None:
        """Return the names of integer labels, from the dataset or else the collator."""
        names, own = class_names(dataset) or self._class_names, getattr(self.data_collator, "class_names", None)
        if names and own and list(own) != names:
            raise ValueError(f"the collator's `class_names` are {list(own)}, and the dataset's label column has the "
                             f"classes {names}: leave `class_names` out")  # fmt: skip
        return names or own

    @contextmanager
    def _labeled(self, routes: Routes | None, names: list[str] | None = None) -> Iterator[None]:
        """Have loaders that are made within the block label their batches by ``routes``, or leave route columns out."""
        collator = self.data_collator
        if self.labels_in_rows:
            self.data_collator = labeled_batches(collator, routes, names)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader; whatever collator makes its batches, labels are found by name."""
        with self._labeled(self.routing.routes, self._label_names(self.train_dataset)):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the evaluation loader; its rows need no route columns."""
        with self._labeled(None):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return the loader of `predict`; its rows need no route columns."""
        with self._labeled(None):
            return super().get_test_dataloader(test_dataset)

    def _check_loader(self) -> None:
        """Refuse integer labels of a loader that somebody else made, unless it has a collator that finds them by name."""
        self._loader_checked = True
        collate = getattr(self.callback_handler.train_dataloader, "collate_fn", None)
        collate = getattr(collate, "data_collator", collate)  # of RemoveColumnsCollator
        found = list(collate.routes or ()) if isinstance(collate, RoutedCollator | LabeledBatches) else None
        if self.labels_in_rows and found != list(self.routing.routes):
            raise ValueError("the training loader is not the trainer's own, and its integer labels have no names: give "
                             "it `collate_fn=RoutedCollator(tokenizer, routes)` with the trainer's routes, or pass "
                             "`data_collator` instead")  # fmt: skip

    def _check_labels_occur(self, labels: Mapping[str, int], steps: int | None = None) -> None:
        """Raise where the labels that occur (label -> how often) route nothing, or no label trains a region.

        ``steps`` are those in which ``labels`` were counted, of a run that goes on. A region without data is then only
        logged, because its data may come later.
        """
        routes, trained = self.routing.routes, [name for name in self.routing.regions if name in self.routing.groups]
        seen = {label: routes[label] for label, count in labels.items() if count}
        if all(route == Route() for route in seen.values()) and any(route != Route() for route in routes.values()):
            within = "" if steps is None else f" in the first {steps} steps (`check_labels_after`)"
            raise ValueError(f"no row is routed: only {sorted(seen)} occurs{within}, which trains everything. Is the label "
                             "column right? (for a run without routing on purpose, use `presets.control()`)")  # fmt: skip
        for region in trained:  # frozen ones need no data
            if any(route.weight(region) for route in seen.values()):
                continue
            if steps is None:
                raise ValueError(f"no row trains the region {region!r}: only {sorted(seen)} occurs in `train_dataset`")
            logger.warning(f"no row has trained the region {region!r} in the first {steps} steps: only {sorted(seen)} "
                           "occurred. If that stays so, the run ends in an error")  # fmt: skip

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._check_before_training()
        output = super()._inner_training_loop(*args, **kwargs)
        self._check_after_training()
        return output

    def _check_before_training(self) -> None:
        self._loader_checked = False
        check_unpacked(getattr(self.train_dataset, "column_names", None) or ())
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, rows in {
            "train_dataset": getattr(self.train_dataset, "rows", self.train_dataset),
            **held_out,
        }.items():
            if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
                check_tokens(rows, name, vocabulary(self.routing.model))
        if isinstance(self.train_dataset, Dataset):
            names = self._label_names(self.train_dataset)
            self._check_labels_occur(check_route_columns(self.train_dataset, self.routing.routes, names))

    def _check_under_way(self) -> None:
        """Check the labels of a stream, once, after `check_labels_after` steps; they cannot be known before."""
        step = self.state.global_step + 1
        if self._labels_checked or isinstance(self.train_dataset, Dataset) or step < self.args.check_labels_after:
            return
        self._labels_checked = True
        self._check_labels_occur(self.tokens_per_route, step)

    def _check_after_training(self) -> None:
        if not isinstance(self.train_dataset, Dataset):
            self._check_labels_occur(self.tokens_per_route)
