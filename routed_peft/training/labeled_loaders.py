"""Loaders of a routed Trainer: whatever collator makes a batch, its labels are found by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from routed_peft.data import RoutedCollator, class_names
from routed_peft.data.labeled_batches import LabeledBatches, labeled_batches
from routed_peft.routes import Routes
from routed_peft.routing.gradient_routing import GradientRouting
from routed_peft.training.finite_weights import Host


class LabeledLoadersMixin(Host):
    """Overrides of Trainer's loaders: the training loader labels its batches, and those of evaluation need no labels."""

    routing: GradientRouting
    labels_in_rows = True
    """Whether labels are columns of the rows; otherwise the trainer labels batches itself."""
    _loader_checked = False
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
